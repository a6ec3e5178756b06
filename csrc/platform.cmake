# What the library is built for, and by which compiler. Sets `architecture`; `add_options` gives a
# compiler its flags. By itself, this file only refuses what cannot be built: cmake -P.

if(CMAKE_CXX_COMPILER_ID STREQUAL "MSVC")
  message(FATAL_ERROR "numattn: the compiler is cl.exe, which does not have the vectors that the "
    "kernels are written in. Take clang-cl, which Visual Studio brings as 'C++ Clang tools for "
    "Windows': set SKBUILD_CMAKE_ARGS=-TClangCL, and build again.")
endif()

# Where Apple's compiler is told what to build for, this need not be the machine that it runs on.
set(architecture "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES MATCHES ";")
  message(FATAL_ERROR "numattn: CMAKE_OSX_ARCHITECTURES is '${CMAKE_OSX_ARCHITECTURES}', but each "
    "architecture has kernels of its own. Build a wheel for each of them (ARCHFLAGS='-arch x86_64' "
    "and ARCHFLAGS='-arch arm64'), and make one wheel of the two by delocate-merge.")
elseif(CMAKE_OSX_ARCHITECTURES)
  set(architecture "${CMAKE_OSX_ARCHITECTURES}")
endif()
string(TOLOWER "${architecture}" architecture)
string(REGEX REPLACE "^amd64$" x86_64 architecture "${architecture}")
string(REGEX REPLACE "^arm64$" aarch64 architecture "${architecture}")

# Appends flags that are written as GCC and Clang take them. clang-cl reads them as cl.exe would,
# where -O3 means nothing and -Wall everything, unless they come after "/clang:".
function(add_options variable)
  if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
    list(TRANSFORM ARGN PREPEND "/clang:")
  endif()
  set(${variable} ${${variable}} ${ARGN} PARENT_SCOPE)
endfunction()
