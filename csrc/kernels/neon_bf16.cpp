#include "kernels/simd/neon_bf16.h"

#include "kernels/make_probes.h"
#include "kernels/make_table.h"

namespace numattn {

// This level adds only products of bfloat16 to neon.
extern constinit const KernelTable kernels_neon_bf16 = {
    {{}, {}, {}, kernels_for<Arithmetic<Float32, Bfloat16Pairs>, Bfloat16Bits>()}};
extern constinit const Probes probes_neon_bf16 = {
    {nullptr, nullptr, nullptr, multiply_adds<Bfloat16Pairs>}, nullptr, nullptr, nullptr};

}  // namespace numattn
