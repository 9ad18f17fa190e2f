// Values of a batch to codes.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// A panel's columns of one row.
struct Columns {
  F32 low;
  F32 high;
};
struct Codes {
  I32 low;
  I32 high;
};

inline __mmask16 lanes(int64_t count) {
  return count >= kLanes ? 0xFFFF : count > 0 ? __mmask16((1u << count) - 1) : 0;
}

inline Columns load_columns(const float* from, __mmask16 low, __mmask16 high) {
  return {F32(_mm512_maskz_loadu_ps(low, from)), F32(_mm512_maskz_loadu_ps(high, from + kLanes))};
}

// The first `count` columns, zero in the others.
inline Columns load_columns(const float* from, int64_t count) {
  return load_columns(from, lanes(count), lanes(count - kLanes));
}

inline void store_columns(float* to, Columns value, int64_t count) {
  _mm512_mask_storeu_ps(to, lanes(count), __m512(value.low));
  _mm512_mask_storeu_ps(to + kLanes, lanes(count - kLanes), __m512(value.high));
}

// Magnitudes as integers keep their order, and a NaN is larger than any number.
inline I32 magnitude(F32 value) { return I32(value) & 0x7FFFFFFF; }
inline I32 larger(I32 a, I32 b) { return I32(_mm512_max_epi32(__m512i(a), __m512i(b))); }
inline int32_t largest_of(I32 magnitudes) { return _mm512_reduce_max_epi32(__m512i(magnitudes)); }
inline I32 larger(I32 found, Columns value) {
  return larger(found, larger(magnitude(value.low), magnitude(value.high)));
}

// A magnitude as a float; NaN for infinity too, which no grid can hold.
inline float finite_or_nan(int32_t bits) {
  if (bits >= 0x7F800000) return __builtin_nanf("");
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Below this a scale has no reciprocal to speak of; what it would hold is taken for zero.
constexpr float kSmallestScale = 1e-30f;

struct Scale {
  float value;
  float reciprocal;
};

inline Scale input_scale(int32_t largest) {
  const float found = finite_or_nan(largest);
  const float scale = (1e-8f > found ? 1e-8f : found) / 127.0f;
  return {scale, 1.0f / scale};
}

inline Scale gradient_scale(int32_t largest) {
  const float scale = finite_or_nan(largest) / 127.0f;
  if (scale < kSmallestScale) return {0.0f, 0.0f};
  return {scale, 1.0f / scale};
}

// The same for every lane.
struct Scales {
  F32 value;
  F32 reciprocal;
};

inline Scales gradient_scales(I32 largest) {
  const F32 nan = all(__builtin_nanf("")), zero{};
  const F32 scale = (largest >= 0x7F800000 ? nan : F32(largest)) / 127.0f;
  const I32 small = scale < kSmallestScale;
  return {small ? zero : scale, small ? zero : 1.0f / scale};
}

// Ties to even; what is not a number becomes some code.
inline I32 rounded(F32 value) { return I32(_mm512_cvtps_epi32(__m512(value))); }

// 16 random bits as numbers in (0, 1).
inline F32 chance(U32 bits) { return fma(to_float(I32(bits)), all(0x1p-16f), all(0x1p-17f)); }
inline Columns chances(U32 bits) { return {chance(bits & 0xFFFFu), chance(bits >> 16)}; }

// Down or up.
inline I32 rounded(F32 value, F32 chance) {
  return I32(_mm512_cvt_roundps_epi32(__m512(value + chance),
                                      _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
inline Codes rounded(Columns value, Columns chance) {
  return {rounded(value.low, chance.low), rounded(value.high, chance.high)};
}

// Four rows of a panel in bytes, saturated: of every four columns those of row 0, then of row 1, ...
struct PackedRows {
  __m512i low;
  __m512i high;
};

inline __m512i packed(I32 a, I32 b, I32 c, I32 d) {
  return _mm512_packs_epi16(_mm512_packs_epi32(__m512i(a), __m512i(b)),
                            _mm512_packs_epi32(__m512i(c), __m512i(d)));
}

inline PackedRows packed(const Codes (&rows)[kQuad]) {
  return {packed(rows[0].low, rows[1].low, rows[2].low, rows[3].low),
          packed(rows[0].high, rows[1].high, rows[2].high, rows[3].high)};
}

// Codes with 128 added are codes whose highest bit is flipped.
inline PackedRows with_128(PackedRows rows) {
  const __m512i bit = _mm512_set1_epi8(char(0x80));
  return {_mm512_xor_si512(rows.low, bit), _mm512_xor_si512(rows.high, bit)};
}

// The rows as they are, `row` bytes apart.
inline void store_rows(uint8_t* to, int64_t row, PackedRows rows) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i next = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512i pairs[] = {_mm512_permutex2var_epi32(rows.low, first, rows.high),
                           _mm512_permutex2var_epi32(rows.low, next, rows.high)};
  for (const __m512i& pair : pairs) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(pair));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row), _mm512_extracti64x4_epi64(pair, 1));
    to += 2 * row;
  }
}

// The rows as one quad.
inline void store_quads(void* to, PackedRows rows) {
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  _mm512_storeu_si512(to, _mm512_shuffle_epi8(rows.low, order));
  _mm512_storeu_si512(static_cast<char*>(to) + kStep / 2, _mm512_shuffle_epi8(rows.high, order));
}

inline Columns scaled(Columns value, F32 factor) {
  return {value.low * factor, value.high * factor};
}
inline Columns scaled(Columns value, Columns factor) {
  return {value.low * factor.low, value.high * factor.high};
}

inline int32_t largest_magnitude(const float* row, int64_t count) {
  I32 found{};
  for (int64_t k = 0; k < count; k += kPanel) {
    found = larger(found, load_columns(row + k, count - k));
  }
  return largest_of(found);
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
