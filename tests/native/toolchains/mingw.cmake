# For Windows by MinGW-w64, of Debian's package g++-mingw-w64-x86-64-posix; run by Wine: `make
# emulate-windows`. Linked statically: Wine brings none of GCC's libraries.
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(CMAKE_CXX_COMPILER x86_64-w64-mingw32-g++-posix)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CROSSCOMPILING_EMULATOR wine)
