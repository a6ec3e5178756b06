# For 64-bit Arm by Debian's package g++-aarch64-linux-gnu; run by qemu-user: `make emulate-arm`. What
# the programs load is the cross compiler's.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu
  CACHE STRING "What runs the programs")
