// The priority of a thread's work for the operating system.
#pragma once

#if defined(__APPLE__)
#include <pthread/qos.h>
#endif

namespace numattn {

// macOS runs threads of a low quality-of-service class on the slow cores, and a new thread does not
// inherit the class of the thread that started it. Other systems need nothing.
class ServiceClass {
 public:
#if defined(__APPLE__)
  // Stores the class of the calling thread.
  ServiceClass() : class_(qos_class_self()) {}
  void give_to_this_thread() const { pthread_set_qos_class_self_np(class_, 0); }

 private:
  qos_class_t class_;
#else
  void give_to_this_thread() const {}
#endif
};

}  // namespace numattn
