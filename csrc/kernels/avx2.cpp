#include "kernels/simd/avx2.h"

#include "kernels/make_probes.h"
#include "kernels/make_table.h"
#include "kernels/simd/avx2_float64.h"

namespace numattn {

extern constinit const KernelTable kernels_avx2 = make_table<Float32, Float64>();
extern constinit const Probes probes_avx2 = make_probes<Float32, Float64>();

}  // namespace numattn
