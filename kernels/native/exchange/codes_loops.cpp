// Rows as integer codes: scale, round, pack, and what was lost, a row in two passes over the first
// cache. All arithmetic is element by element, and a maximum does not depend on its order.
#include "../common/rounding.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kInfinity = 0x7F800000;
// The smallest scale: below, its inverse would overflow.
constexpr float kSmallestScale = 0x1p-126f;
constexpr int64_t kAhead = 8;  // Rows that are fetched before they are added to.

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int width_at(int64_t left) { return left < kLanes ? int(left) : kLanes; }

inline F32 load_some(const float* from, int width) {
  return width == kLanes ? load(from) : load_part(from, width);
}

inline void store_some(float* to, F32 value, int width) {
  if (width == kLanes) {
    store(to, value);
  } else {
    store_part(to, value, width);
  }
}

// Stores the first `width` lanes as bytes; they are in [-128, 127].
inline void store_bytes(uint8_t* to, I32 values, int width) {
  const I8 bytes = narrow_to_bytes(values);
  if (width == kLanes) {
    __builtin_memcpy(to, &bytes, kLanes);
  } else if (width == kLanes / 2) {
    __builtin_memcpy(to, &bytes, kLanes / 2);
  } else {
    int8_t all[kLanes];
    __builtin_memcpy(all, &bytes, kLanes);
    for (int lane = 0; lane < width; ++lane) to[lane] = uint8_t(all[lane]);
  }
}

// Signed bytes as integers; lanes from `width` on are zero.
inline I32 load_bytes(const uint8_t* from, int width) {
  I8 bytes{};
  if (width == kLanes) {
    __builtin_memcpy(&bytes, from, kLanes);
#ifdef __AVX512F__
  } else if (width == kLanes / 2) {
    bytes = I8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
  } else {
    bytes = load_few<I8>(from, width);
  }
  return widen(bytes);
}

// The upper half of the lanes, moved down.
inline I32 upper_half(I32 a) {
#if defined(__AVX512F__)
  return I32(_mm512_shuffle_i64x2(__m512i(a), __m512i(a), 0x4E));
#elif defined(__AVX2__)
  return I32(_mm256_permute2x128_si256(__m256i(a), __m256i(a), 1));
#else
  return __builtin_shufflevector(a, a, 2, 3, 0, 1);
#endif
}

// The lower halves of two vectors, one after the other.
inline I32 join_halves(I32 low, I32 high) {
#if defined(__AVX512F__)
  return I32(_mm512_inserti64x4(__m512i(low), _mm512_castsi512_si256(__m512i(high)), 1));
#elif defined(__AVX2__)
  return I32(_mm256_inserti128_si256(__m256i(low), _mm256_castsi256_si128(__m256i(high)), 1));
#else
  return __builtin_shufflevector(low, high, 0, 1, 4, 5);
#endif
}

// As a pattern of bits, the largest magnitude is the largest integer, NaN above infinity.
inline int largest_lane(I32 a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(__m512i(a));
#elif defined(__AVX2__)
  const __m256i wide = __m256i(a);
  __m128i found = _mm_max_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  found = _mm_max_epi32(found, _mm_shuffle_epi32(found, 0x4E));
  found = _mm_max_epi32(found, _mm_shuffle_epi32(found, 0xB1));
  return _mm_cvtsi128_si32(found);
#else
  int found = a[0];
  for (int lane = 1; lane < kLanes; ++lane) found = a[lane] > found ? a[lane] : found;
  return found;
#endif
}

struct Row {
  const float* values;
  float* residual;  // or null
  int64_t dim;
};

// Adds the residual where it is carried and returns the largest magnitude's bits.
template <bool Carried>
[[gnu::always_inline]] inline int largest_of(const Row& row) {
  I32 largest{};
  for (int64_t d = 0; d < row.dim; d += kLanes) {
    const int width = width_at(row.dim - d);
    F32 values = load_some(row.values + d, width);
    if constexpr (Carried) {
      values += load_some(row.residual + d, width);
      store_some(row.residual + d, values, width);
    }
    const I32 magnitude = I32(values) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest_lane(largest);
}

struct Coder {
  F32 scale, inverse, most, least;
  uint32_t row_key;
};

template <bool Stochastic>
[[gnu::always_inline]] inline I32 code_of(const Coder& coder, const float* from, float* residual, int64_t d, int width) {
  const F32 values = load_some(from + d, width);
  const F32 scaled = values * coder.inverse;
  F32 codes;
  if constexpr (Stochastic) {
    codes = round_to_integer(scaled, random_lanes(coder.row_key, uint32_t(d)));
  } else {
    codes = round_half_even(scaled);
  }
  codes = max(min(codes, coder.most), coder.least);
  if (residual != nullptr) store_some(residual + d, values - coder.scale * codes, width);
  return __builtin_convertvector(codes, I32);
}

// Inlined, so that a row's scale stays in registers.
template <bool Stochastic, int Bits>
[[gnu::always_inline]] inline void write_codes(const Coder& coder, const float* from,
                                               float* residual, int64_t dim, uint8_t* to) {
  if constexpr (Bits == 8) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int width = width_at(dim - d);
      store_bytes(to + d, code_of<Stochastic>(coder, from, residual, d, width), width);
    }
  } else if (dim == kLanes) {
    const I32 codes = code_of<Stochastic>(coder, from, residual, 0, kLanes);
    store_bytes(to, (codes & 15) | upper_half(codes) << 4, kLanes / 2);
  } else {
    const int64_t half = (dim + 1) / 2;
    for (int64_t d = 0; d < half; d += kLanes) {
      const int width = width_at(half - d);
      const int high_width = int(dim - half - d < width ? dim - half - d : width);
      const I32 low = code_of<Stochastic>(coder, from, residual, d, width);
      // What is loaded behind a row's end is zero, and so is its code.
      I32 high{};
      if (high_width > 0) {
        high = code_of<Stochastic>(coder, from, residual, half + d, high_width);
      }
      store_bytes(to + d, (low & 15) | high << 4, width);
    }
  }
}

inline void write_scale(const CodedRows& rows, int64_t row, float scale) {
  if (rows.scale_type == ScaleType::float32) {
    __builtin_memcpy(rows.scales + 4 * row, &scale, 4);
  } else {
    const uint16_t upper = uint16_t(bits_of(scale) >> 16);
    __builtin_memcpy(rows.scales + 2 * row, &upper, 2);
  }
}

inline float read_scale(const CodedRows& rows, int64_t row) {
  if (rows.scale_type == ScaleType::float32) {
    float scale;
    __builtin_memcpy(&scale, rows.scales + 4 * row, 4);
    return scale;
  }
  uint16_t upper;
  __builtin_memcpy(&upper, rows.scales + 2 * row, 2);
  return float_of(uint32_t(upper) << 16);
}

inline int64_t code_bytes(const CodedRows& rows) { return (rows.dim * rows.bits + 7) / 8; }

inline int64_t dim_of(const CodedRows& rows, int64_t row) {
  return row + 1 < rows.rows ? rows.dim : rows.last_dim;
}

// Encodes row i; returns whether it is finite.
template <bool Carried, bool Stochastic, int Bits>
[[gnu::always_inline]] inline bool encode_row(const CodedRows& rows, const float* values,
                                              float* residual, const Rounding& rounding, int64_t i,
                                              int64_t dim, uint8_t* codes) {
  constexpr float largest_code = (1 << (Bits - 1)) - 1;
  const int largest = largest_of<Carried>({values, residual, dim});
  if (largest >= kInfinity) {
    write_scale(rows, i, __builtin_nanf(""));
    __builtin_memset(codes, 0, size_t((dim * Bits + 7) / 8));
    if (residual != nullptr) __builtin_memset(residual, 0, size_t(dim) * sizeof(float));
    return false;
  }
  float scale = float_of(uint32_t(largest)) / largest_code;
  if (rows.scale_type == ScaleType::bfloat16) {
    scale = float_of((bits_of(scale) + 0xFFFF) & 0xFFFF0000u);
  }
  const bool zero = scale < kSmallestScale;
  if (zero) scale = 0.0f;
  write_scale(rows, i, scale);
  Coder coder{all(scale), all(zero ? 0.0f : 1.0f / scale), all(largest_code), all(-largest_code),
              0};
  if constexpr (Stochastic) {
    coder.row_key = row_key(rounding.key,
                            rounding.numbers != nullptr ? rounding.numbers[i] : rounding.first + i);
  }
  write_codes<Stochastic, Bits>(coder, Carried ? residual : values, residual, dim, codes);
  return true;
}

template <bool Carried, bool Stochastic, int Bits>
int64_t encode_rows(const CodedRows& rows, const float* values, float* residual,
                    const Rounding& rounding, int64_t begin, int64_t end) {
  const int64_t bytes = code_bytes(rows);
  int64_t not_finite = end;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * rows.dim, dim = dim_of(rows, i);
    uint8_t* codes = rows.codes + i * bytes;
    float* own = residual != nullptr ? residual + at : nullptr;
    // With a constant width, the commonest rows stay in registers between their passes.
    const bool finite =
        dim == 16 ? encode_row<Carried, Stochastic, Bits>(rows, values + at, own, rounding, i, 16,
                                                          codes)
                  : encode_row<Carried, Stochastic, Bits>(rows, values + at, own, rounding, i, dim,
                                                          codes);
    if (!finite && not_finite == end) not_finite = i;
  }
  return not_finite;
}

template <bool Carried, bool Stochastic>
int64_t encode_bits(const CodedRows& rows, const float* values, float* residual,
                    const Rounding& rounding, int64_t begin, int64_t end) {
  return rows.bits == 8
             ? encode_rows<Carried, Stochastic, 8>(rows, values, residual, rounding, begin, end)
             : encode_rows<Carried, Stochastic, 4>(rows, values, residual, rounding, begin, end);
}

int64_t encode(const CodedRows& rows, const float* values, float* residual, bool carried,
               const Rounding& rounding, int64_t begin, int64_t end) {
  if (carried) {
    return rounding.stochastic
               ? encode_bits<true, true>(rows, values, residual, rounding, begin, end)
               : encode_bits<true, false>(rows, values, residual, rounding, begin, end);
  }
  return rounding.stochastic
             ? encode_bits<false, true>(rows, values, residual, rounding, begin, end)
             : encode_bits<false, false>(rows, values, residual, rounding, begin, end);
}

template <bool Add>
inline void write_values(float* to, F32 step, I32 codes, int width) {
  F32 values = step * __builtin_convertvector(codes, F32);
  if constexpr (Add) values = load_some(to, width) + values;
  store_some(to, values, width);
}

template <bool Add>
void decode_row(const uint8_t* codes, float scale, int64_t dim, int bits, float* out) {
  const F32 step = all(scale);
  if (bits == 8) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int width = width_at(dim - d);
      write_values<Add>(out + d, step, load_bytes(codes + d, width), width);
    }
    return;
  }
  if (dim == kLanes) {
    const I32 bytes = load_bytes(codes, kLanes / 2);
    write_values<Add>(out, step, join_halves(((bytes & 15) ^ 8) - 8, bytes >> 4), kLanes);
    return;
  }
  const int64_t half = (dim + 1) / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const int width = width_at(half - d);
    const I32 bytes = load_bytes(codes + d, width);
    write_values<Add>(out + d, step, ((bytes & 15) ^ 8) - 8, width);
    const int high_width = int(dim - half - d < width ? dim - half - d : width);
    if (high_width > 0) write_values<Add>(out + half + d, step, bytes >> 4, high_width);
  }
}

void decode(const CodedRows& rows, float* out, const int64_t* targets, bool add, float alpha,
            int64_t begin, int64_t end) {
  const int64_t bytes = code_bytes(rows);
  for (int64_t i = begin; i < end; ++i) {
    if (targets != nullptr && i + kAhead < end) {
      __builtin_prefetch(out + targets[i + kAhead] * rows.dim, 1);
    }
    float* to = out + (targets != nullptr ? targets[i] : i) * rows.dim;
    const uint8_t* codes = rows.codes + i * bytes;
    const float scale = read_scale(rows, i);
    if (add) {
      decode_row<true>(codes, alpha * scale, dim_of(rows, i), rows.bits, to);
    } else {
      decode_row<false>(codes, alpha * scale, dim_of(rows, i), rows.bits, to);
    }
  }
}

}  // namespace

extern const CodeLoops code_loops{&encode, &decode};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
