#include "simd_generic.h"

#include "make_table.h"

namespace numattn {

extern constinit const KernelTable kernels_generic = make_table<Float32>("generic", 8);

}  // namespace numattn
