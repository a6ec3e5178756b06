# Settings of all targets, in the package and in the native tests.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
# On Windows, Python brings the C run-time library but not the C++ one, whose mutex must not be
# older than the compiler. So the run-time library is linked into the extension.
set(CMAKE_MSVC_RUNTIME_LIBRARY MultiThreaded)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

include(${CMAKE_CURRENT_LIST_DIR}/platform.cmake)
