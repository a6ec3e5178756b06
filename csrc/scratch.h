// Memory that a thread keeps from call to call, so that no call pays for fresh pages.
#pragma once

#include <cstdint>

namespace numattn {

// At least `bytes` bytes, aligned to 64, of the calling thread: valid until that thread asks
// again or ends. Null if the memory cannot be had.
void* thread_scratch(int64_t bytes);

}  // namespace numattn
