# For every target, of the package and of the native tests.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
# On Windows, Python brings the run-time library of C and not C++'s, whose mutex may not be older than
# the compiler: it becomes part of the extension.
set(CMAKE_MSVC_RUNTIME_LIBRARY MultiThreaded)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

include(${CMAKE_CURRENT_LIST_DIR}/platform.cmake)
