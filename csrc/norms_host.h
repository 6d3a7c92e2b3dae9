// What the host entries of the norms share: their arguments, types by code, when vectors fit.
#pragma once

#include <stddef.h>

#include "abi.h"
#include "norm_types.cuh"

// kernels/_cuda.py packs these with native alignment: pointers, then numbers, the stream last.
struct SwNormForward {
  const void *x, *residual, *weight, *bias;
  void *y, *summed, *stats;
  int64_t x_stride, residual_stride, rows, width;
  float eps, weight_offset;
  int32_t types, centered;
  void* stream;
};

struct SwNormBackward {
  const void *dy, *dsummed, *s, *weight, *stats;
  void *ds, *partial, *dweight, *dbias;
  int64_t dy_stride, dsummed_stride, s_stride, rows, width;
  float weight_offset;
  int32_t types, centered, multiprocessors;
  void* stream;
};

static_assert(sizeof(SwNormForward) == 112 && sizeof(SwNormBackward) == 136, "no padding");

namespace sw {

// The three codes in `types`: of the rows in bits 0 to 3, of weight and dweight in 4 to 7, of bias
// and dbias in 8 to 11.
constexpr int type_at(int types, int place) { return types >> (4 * place) & 15; }

constexpr bool known_type(int code) { return code >= 0 && code <= int(Kind::kBFloat16); }

// Columns are counted in 32 bits, with room for the stride of a loop over them.
inline bool row_sizes_fit(int64_t rows, int64_t width) {
  return rows >= 0 && width >= 1 && width <= INT32_MAX / 4;
}

// Whether rows at these addresses, with these strides and widths, can be read 16 bytes at a time.
struct VectorRule {
  uintptr_t bits = 0;

  template <typename... Pointers>
  VectorRule& addresses(Pointers... p) {
    ((bits |= reinterpret_cast<uintptr_t>(p)), ...);
    return *this;
  }

  template <typename... Counts>
  VectorRule& elements(int bytes, Counts... counts) {
    ((bits |= uintptr_t(counts * bytes)), ...);
    return *this;
  }

  bool holds() const { return bits % kVectorBytes == 0; }
};

}  // namespace sw
