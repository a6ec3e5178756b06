#include "make_table.h"
#include "simd_generic.h"

namespace numattn {

extern constinit const KernelTable kernels_generic = make_table<Float32>("generic", 8);

}  // namespace numattn
