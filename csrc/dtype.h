// What q, k, v and out hold.
#pragma once

namespace numattn {

// 16-bit floats are computed in float32, but for products of bfloat16 where a CPU has them.
enum class Dtype { float32, float64, float16, bfloat16 };
constexpr int kDtypes = 4;

constexpr int bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace numattn
