// How much a thread's work matters to the operating system.
#pragma once

#if defined(__APPLE__)
#include <pthread/qos.h>
#endif

namespace numattn {

// macOS keeps threads of a low quality-of-service class on its slow cores, and new threads do not
// get their maker's. Elsewhere there is nothing to do.
class ServiceClass {
 public:
#if defined(__APPLE__)
  // The calling thread's.
  ServiceClass() : class_(qos_class_self()) {}
  void give_to_this_thread() const { pthread_set_qos_class_self_np(class_, 0); }

 private:
  qos_class_t class_;
#else
  void give_to_this_thread() const {}
#endif
};

}  // namespace numattn
