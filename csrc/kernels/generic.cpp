#include "kernels/simd/generic.h"

#include "kernels/make_probes.h"
#include "kernels/make_table.h"

namespace numattn {

extern constinit const KernelTable kernels_generic = make_table<Float32, Float64>();
extern constinit const Probes probes_generic = make_probes<Float32, Float64>();

}  // namespace numattn
