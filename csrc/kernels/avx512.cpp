#include "make_table.h"
#include "simd_avx512.h"

namespace numattn {

extern constinit const KernelTable kernels_avx512 = make_table<Float32>("avx512", 4);

}  // namespace numattn
