#include "kernels/simd/neon.h"

#include "kernels/make_probes.h"
#include "kernels/make_table.h"
#include "kernels/simd/neon_float64.h"

namespace numattn {

extern constinit const KernelTable kernels_neon = make_table<Float32, Float64>();
extern constinit const Probes probes_neon = make_probes<Float32, Float64>();

}  // namespace numattn
