# The architecture and the compiler of the build. Sets `architecture` and defines `add_options`,
# which collects compiler flags. Run as a script (cmake -P), this file only refuses builds that
# cannot work.

if(CMAKE_CXX_COMPILER_ID STREQUAL "MSVC")
  message(FATAL_ERROR "numattn: the compiler is cl.exe, which does not have the vectors that the "
    "kernels are written in. Take clang-cl, which Visual Studio brings as 'C++ Clang tools for "
    "Windows': set SKBUILD_CMAKE_ARGS=-TClangCL, and build again.")
endif()

if(CMAKE_OSX_ARCHITECTURES MATCHES ";")
  message(FATAL_ERROR "numattn: CMAKE_OSX_ARCHITECTURES is '${CMAKE_OSX_ARCHITECTURES}', but each "
    "architecture has kernels of its own. Build a wheel for each of them (ARCHFLAGS='-arch x86_64' "
    "and ARCHFLAGS='-arch arm64'), and make one wheel of the two by delocate-merge.")
endif()

# Ask the compiler what it compiles for. That may differ from the machine: the system may have 32
# bits, or the compiler may be a cross-compiler, which can be configured in several ways.
set(architecture other)
if(NOT CMAKE_SCRIPT_MODE_FILE)
  include(CheckCXXSymbolExists)
  foreach(candidate x86_64 aarch64)
    check_cxx_symbol_exists(__${candidate}__ "" numattn_compiles_for_${candidate})
    if(numattn_compiles_for_${candidate})
      set(architecture ${candidate})
    endif()
  endforeach()
endif()

# Appends flags in the form that GCC and Clang take. clang-cl reads flags without the prefix
# "/clang:" as cl.exe does: there, -O3 means nothing and -Wall enables every warning.
function(add_options variable)
  if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
    list(TRANSFORM ARGN PREPEND "/clang:")
  endif()
  set(${variable} ${${variable}} ${ARGN} PARENT_SCOPE)
endfunction()
