#include "kernels/simd/generic.h"

#include "kernels/make_table.h"
#include "kernels/peak.h"

namespace numattn {

extern constinit const KernelTable kernels_generic = make_table<Float32, Float64>();
extern constinit const Probes probes_generic = make_probes<Float32, Float64>();

}  // namespace numattn
