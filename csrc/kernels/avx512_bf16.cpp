#include "kernels/simd/avx512_bf16.h"

#include "kernels/make_table.h"

namespace numattn {

// All that this level adds to avx512.
extern constinit const DtypeKernels bfloat16_kernels_avx512_bf16 =
    kernels_for<Bfloat16Pairs, Bfloat16Bits>();

}  // namespace numattn
