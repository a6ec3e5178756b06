#include "simd/avx2.h"

#include "make_table.h"
#include "simd/avx2_float64.h"

namespace numattn {

extern constinit const KernelTable kernels_avx2 = make_table<Float32, Float64>("avx2");

}  // namespace numattn
