#include "make_table.h"
#include "simd_avx2.h"

namespace numattn {

extern constinit const KernelTable kernels_avx2 = make_table<Float32>("avx2", 8);

}  // namespace numattn
