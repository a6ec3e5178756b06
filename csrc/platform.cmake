# What the library is built for, and by which compiler. Sets `architecture`; `add_options` gives a
# compiler its flags. By itself, this file only refuses what cannot be built: cmake -P.

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

# The compiler says what it compiles for. The machine need not be the same: it may have a system of
# 32 bits, and compilers for other machines are told so in several ways.
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

# Appends flags that are written as GCC and Clang take them. clang-cl reads them as cl.exe would,
# where -O3 means nothing and -Wall everything, unless they come after "/clang:".
function(add_options variable)
  if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
    list(TRANSFORM ARGN PREPEND "/clang:")
  endif()
  set(${variable} ${${variable}} ${ARGN} PARENT_SCOPE)
endfunction()
