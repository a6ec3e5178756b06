#include "simd_avx2.h"

#include "make_table.h"

namespace numattn {

extern constinit const KernelTable kernels_avx2 = make_table<Float32>("avx2", 8);

}  // namespace numattn
