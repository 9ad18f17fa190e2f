#include "loss_loops.h"

#include "../common/simd.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// e^-a for a >= 0 to 1e-7 of its value, from 87 on e^-87. A NaN stays one.
inline F32 exp_negative(F32 a) {
  const F32 x = max(all(-87.0f), -a);
  const F32 n = round_half_even(x * all(1.44269504f));
  // ln 2 in two parts, the first of few bits: n times it is exact.
  const F32 r = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);
  // Cephes' expf, S. Moshier: e^r = 1 + r + r^2 P(r) on [-ln 2 / 2, ln 2 / 2].
  F32 p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  // 2^n: n is in [-126, 0], and whatever a NaN makes of it stays a NaN in the product.
  const F32 magic = all(12582912.0f);
  return p * F32((U32(n + magic) + (127u - 0x4B400000u)) << 23);
}

// log(1 + e) for e in [0, 1] as 2 atanh(t), t = e / (2 + e) <= 1/3; the series' first term left
// out is 1e-8 of the sum.
inline F32 log_one_plus(F32 e) {
  const F32 t = e / (e + all(2.0f));
  const F32 u = t * t;
  F32 p = all(2.0f / 15.0f);
  p = p * u + all(2.0f / 13.0f);
  p = p * u + all(2.0f / 11.0f);
  p = p * u + all(2.0f / 9.0f);
  p = p * u + all(2.0f / 7.0f);
  p = p * u + all(2.0f / 5.0f);
  p = p * u + all(2.0f / 3.0f);
  return t * (p * u + all(2.0f));
}

// Sums kept apart, at every level the same ones.
constexpr int kSums = 16;

double bce(const float* logits, const float* labels, float* gradients, int64_t count,
           float factor) {
  double sums[kSums] = {};
  for (int64_t begin = 0; begin < count; begin += kSums) {
    const int64_t rest = count - begin < kSums ? count - begin : kSums;
    float z[kSums] = {}, y[kSums] = {}, loss[kSums], gradient[kSums];
    __builtin_memcpy(z, logits + begin, size_t(rest) * sizeof(float));
    __builtin_memcpy(y, labels + begin, size_t(rest) * sizeof(float));
    for (int i = 0; i < kSums; i += kLanes) {
      const F32 logit = load(z + i), label = load(y + i);
      const F32 e = exp_negative(abs(logit));
      store(loss + i, (max(F32{}, logit) - logit * label) + log_one_plus(e));
      const F32 sigmoid = (logit < F32{} ? e : all(1.0f)) / (e + all(1.0f));
      store(gradient + i, (sigmoid - label) * factor);
    }
    __builtin_memcpy(gradients + begin, gradient, size_t(rest) * sizeof(float));
    for (int i = 0; i < rest; ++i) sums[i] += double(loss[i]);
  }
  double sum = 0.0;
  for (double part : sums) sum += part;
  return sum;
}

}  // namespace

const LossLoops loss_loops = {bce};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
