// y = x @ w^T + bias, x in fp32, w in 4 or 8 bits: a weight becomes a float in a register, and is never stored as one.
// Plain twins: quantize_groups (4 bits) and quantize (8 bits, per channel) of ops/quant.py, dequantised.
//
// w lies in panels of 16 outputs: [E/16][K / per][16] words of 32 bits, each `per` = 8 or 4 signed weights of one output,
// the first in the lowest bits. Every row is summed in the same order whatever rows stand beside it.
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#pragma GCC optimize("no-associative-math")  // or the order would differ with the number of rows

#if defined(__AVX512F__)
enum { W = 16, ROWS = 8 };
#else
enum { W = 8, ROWS = 4 };  // sixteen registers: half a panel at a time
#endif
typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2)));
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
enum { CHAINS = 2 };  // sums side by side, so that an addition does not wait for the last one

static inline vec bf16(const uint16_t *p) {
  halves half;
  memcpy(&half, p, sizeof half);
  return (vec)(__builtin_convertvector(half, ints) << 16);
}

// Floats of the signed 4-bit numbers at bit `at` of each word.
static inline vec nibble(ints words, const int at) {
#if defined(__AVX512F__)
  const __m512 level = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  return (vec)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, at), level);  // looks at the lowest 4 bits
#else
  return __builtin_convertvector((words << (28 - at)) >> 28, vec);
#endif
}

// W outputs of a panel with `rows` rows; bits and rows are constants. params: [groups][2][16] bf16, scale and centre, for 4 bits.
static inline __attribute__((always_inline)) void product(const int bits, const int rows, const int32_t *w,
                                                          const uint16_t *params, const float *x, const float *sums, int k,
                                                          int group, vec *out) {
  const int per = 32 / bits, groups = k / group;
  vec total[ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) total[m] = (vec){0};
  for (int g = 0; g < groups; g++) {
    vec acc[ROWS][CHAINS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) acc[m][0] = acc[m][1] = (vec){0};
    for (int at = g * group; at < (g + 1) * group; at += per, w += 16) {
      ints words;
      memcpy(&words, w, sizeof words);
#pragma GCC unroll 8
      for (int i = 0; i < per; i++) {
        vec weight = bits == 4 ? nibble(words, 4 * i) : __builtin_convertvector((words << (24 - 8 * i)) >> 24, vec);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) acc[m][i % CHAINS] += weight * x[(int64_t)m * k + at + i];
      }
    }
    if (bits == 4) {
      vec scale = bf16(params + g * 32), centre = bf16(params + g * 32 + 16);
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) total[m] += scale * (acc[m][0] + acc[m][1]) + centre * sums[(int64_t)m * groups + g];
    } else {
#pragma GCC unroll 8
      for (int m = 0; m < rows; m++) total[m] = acc[m][0] + acc[m][1];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++) out[m] = total[m];
}

static inline __attribute__((always_inline)) int some(const int bits, int rows, const int32_t *w, const uint16_t *params,
                                                      const float *x, const float *sums, int k, int group, vec *out) {
  if (rows >= ROWS) return product(bits, ROWS, w, params, x, sums, k, group, out), ROWS;
  if (ROWS > 4 && rows >= 4) return product(bits, 4, w, params, x, sums, k, group, out), 4;
  if (rows >= 2) return product(bits, 2, w, params, x, sums, k, group, out), 2;
  return product(bits, 1, w, params, x, sums, k, group, out), 1;
}

static void linear(int bits, const float *x, const int32_t *w, const uint16_t *params, const float *scales,
                   const float *bias, float *y, float *sums, int n, int k, int e, int group, int threads) {
  const int groups = k / group;
#pragma omp parallel num_threads(threads)
  {
    if (bits == 4) {
#pragma omp for
      for (int64_t i = 0; i < (int64_t)n * groups; i++) {
        vec parts = {0};
        for (int j = 0; j < group; j += W) parts += *(const vec *)(x + i * group + j);
        sums[i] = 0;
        for (int j = 0; j < W; j++) sums[i] += parts[j];
      }
    }
#pragma omp for nowait
    for (int j = 0; j < e; j += W) {
      const int32_t *panel = w + (int64_t)(j / 16 * 16) * k * bits / 32 + j % 16;
      const uint16_t *own = params ? params + (int64_t)(j / 16 * 16) * groups * 2 + j % 16 : NULL;
      int wide = e - j < W ? e - j : W;
      vec out[ROWS];
      for (int m = 0, did; m < n; m += did) {
        const float *rows = x + (int64_t)m * k;
        did = bits == 4 ? some(4, n - m, panel, own, rows, sums + (int64_t)m * groups, k, group, out)
                        : some(8, n - m, panel, NULL, rows, NULL, k, group, out);
        for (int r = 0; r < did; r++) {
          float *to = y + (int64_t)(m + r) * e + j;
          for (int i = 0; i < wide; i++) to[i] = out[r][i] * (scales ? scales[j + i] : 1) + (bias ? bias[j + i] : 0);
        }
      }
    }
  }
}

// x [n, k], bias [e] or NULL, y [n, e]; sums: scratch of n * k / group floats; params as above; 16 divides group, group divides k.
void int4_linear(const float *x, const int32_t *w, const uint16_t *params, const float *bias, float *y, float *sums, int n,
                 int k, int e, int group, int threads) {
  linear(4, x, w, params, NULL, bias, y, sums, n, k, e, group, threads);
}

// scales [e]; 4 divides k.
void int8_weight_linear(const float *x, const int32_t *w, const float *scales, const float *bias, float *y, int n, int k,
                        int e, int threads) {
  linear(8, x, w, NULL, scales, bias, y, NULL, n, k, e, k, threads);
}
