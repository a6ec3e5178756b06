// How the CPU rounds while work items run.
#pragma once

#include <cfenv>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace numattn {

// While the object exists, its thread rounds to nearest, keeps subnormal numbers and traps nothing.
// Each thread has its own settings, and some libraries change them (one built with -ffast-math does
// when it is loaded). Without this object, results would depend on which thread computed them. The
// destructor restores the settings and the flags of the calling thread.
class FloatEnvironment {
 public:
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

#if defined(__x86_64__)
  FloatEnvironment() : before_(_mm_getcsr()) { _mm_setcsr(kDefault); }
  ~FloatEnvironment() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kDefault = 0x1f80;  // MXCSR when a process starts
  unsigned before_;
#elif defined(__aarch64__) && defined(__GNUC__)
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(settings_));
    __asm__ volatile("mrs %0, fpsr" : "=r"(flags_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~FloatEnvironment() {
    __asm__ volatile("msr fpsr, %0" ::"r"(flags_));
    __asm__ volatile("msr fpcr, %0" ::"r"(settings_));
  }

 private:
  uint64_t settings_, flags_;
#else
  FloatEnvironment() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
#endif
};

}  // namespace numattn
