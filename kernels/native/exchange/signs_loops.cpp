// One bit a value: magnitudes summed in a fixed order, signs packed eight a byte.
#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Sums are kept in this many doubles at every level, so that their order is the same at all.
constexpr int kSums = 16;
constexpr int kHalfLanes = kLanes / 2;

typedef double F64 __attribute__((vector_size(8 * kHalfLanes)));
typedef float HalfF32 __attribute__((vector_size(4 * kHalfLanes)));

inline F64 doubles(F32 value, int half) {
  HalfF32 part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&value) + half * sizeof part, sizeof part);
  return __builtin_convertvector(part, F64);
}

template <bool Squares>
double compensate_all(const float* gradient, float* residual, int64_t count) {
  constexpr int kVectors = kSums / kLanes;
  F64 sums[2 * kVectors] = {};
  const auto add = [&](int k, F32 value) {
    for (int half = 0; half < 2; ++half) {
      const F64 part = doubles(Squares ? value : abs(value), half);
      sums[2 * k + half] += Squares ? part * part : part;
    }
  };
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const int64_t at = i + k * kLanes;
      const F32 value = load(gradient + at) + load(residual + at);
      store(residual + at, value);
      add(k, value);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    const int64_t at = i + k * kLanes, left = count - at;
    if (left <= 0) continue;
    F32 value{};
    if (left >= kLanes) {
      value = load(gradient + at) + load(residual + at);
      store(residual + at, value);
    } else {
      value = load_part(gradient + at, int(left)) + load_part(residual + at, int(left));
      store_part(residual + at, value, int(left));
    }
    add(k, value);
  }
  double all[kSums];
  __builtin_memcpy(all, sums, sizeof all);
  for (int step = kSums / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) all[lane] += all[lane + step];
  }
  return all[0];
}

double compensate(const float* gradient, float* residual, int64_t count, bool squares) {
  return squares ? compensate_all<true>(gradient, residual, count)
                 : compensate_all<false>(gradient, residual, count);
}

// A bit for every lane that is >= 0, the first lowest.
inline uint32_t bits_of(F32 values) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(values), _mm512_setzero_ps(), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(__m256(values), __m256{}, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(values[lane] >= 0.0f) << lane;
  return bits;
#endif
}

// scale where a bit is set, -scale elsewhere.
inline F32 signed_scale(uint32_t bits, float scale) {
#if defined(__AVX512F__)
  return F32(_mm512_mask_blend_ps(__mmask16(bits), _mm512_set1_ps(-scale), _mm512_set1_ps(scale)));
#else
  U32 lane_bit;
  for (int lane = 0; lane < kLanes; ++lane) lane_bit[lane] = 1u << lane;
  return (lane_bit & bits) != 0 ? all(scale) : all(-scale);
#endif
}

constexpr int kGroup = kLanes < 8 ? 8 : kLanes;  // Values whose bits are whole bytes.

void encode(float* residual, int64_t count, float scale, uint8_t* bits) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    uint32_t word = 0;
#pragma GCC unroll 2
    for (int k = 0; k < kGroup; k += kLanes) {
      const F32 value = load(residual + i + k);
      const uint32_t own = bits_of(value);
      store(residual + i + k, value - signed_scale(own, scale));
      word |= own << k;
    }
    __builtin_memcpy(bits + i / 8, &word, kGroup / 8);
  }
  for (; i < count; i += 8) {
    uint32_t byte = 0;
    for (int k = 0; k < 8 && i + k < count; ++k) {
      const bool positive = residual[i + k] >= 0.0f;
      residual[i + k] -= positive ? scale : -scale;
      byte |= uint32_t(positive) << k;
    }
    bits[i / 8] = uint8_t(byte);
  }
}

template <bool Add>
void decode_all(const uint8_t* bits, int64_t count, float scale, float* out) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    uint32_t word = 0;
    __builtin_memcpy(&word, bits + i / 8, kGroup / 8);
#pragma GCC unroll 2
    for (int k = 0; k < kGroup; k += kLanes) {
      F32 value = signed_scale(word >> k, scale);
      if constexpr (Add) value = load(out + i + k) + value;
      store(out + i + k, value);
    }
  }
  for (; i < count; ++i) {
    const float value = (bits[i / 8] >> (i % 8) & 1) != 0 ? scale : -scale;
    out[i] = Add ? out[i] + value : value;
  }
}

void decode(const uint8_t* bits, int64_t count, float scale, float* out, bool add) {
  if (add) {
    decode_all<true>(bits, count, scale, out);
  } else {
    decode_all<false>(bits, count, scale, out);
  }
}

}  // namespace

extern const SignLoops sign_loops{&compensate, &encode, &decode};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
