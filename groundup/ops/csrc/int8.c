// y = x @ w^T + bias with both sides as 8-bit integers: w quantised once per output, x per row as it arrives.
// Plain twin: dynamic_linear of ops/quant.py. Sums are integers, so a row's result never depends on the rows beside it.
//
// w lies in panels of 16 outputs, four inputs of an output side by side: [E/16][K/4][16][4], the order in which dot-product
// instructions and AMX tiles read it, K rounded up to 64. These multiply an unsigned number by a signed one, so w is stored
// plus 128, and every sum starts at -128 sum(x).
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// A vector of 32-bit sums; dot4 adds to each the products of its four weights (unsigned) with the four numbers of x.
#if defined(__AVX512VNNI__)
enum { LANES = 16, ROWS = 8, PANELS = 2 };
typedef __m512i vec;
static inline vec all(int32_t v) { return _mm512_set1_epi32(v); }
static inline vec load(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline void store(int32_t *p, vec v) { _mm512_storeu_si512(p, v); }
static inline vec dot4(vec sum, vec w, vec x) { return _mm512_dpbusd_epi32(sum, w, x); }
#elif defined(__AVX2__)
enum { LANES = 8, ROWS = 4, PANELS = 1 };
typedef __m256i vec;
static inline vec all(int32_t v) { return _mm256_set1_epi32(v); }
static inline vec load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void store(int32_t *p, vec v) { _mm256_storeu_si256((__m256i *)p, v); }
#if defined(__AVXVNNI__)
static inline vec dot4(vec sum, vec w, vec x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
#define SIGNED_WEIGHTS
static inline vec dot4(vec sum, vec w, vec x) {  // pairs of products fit 16 bits, since neither side holds -128
  vec pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(_mm256_xor_si256(w, _mm256_set1_epi8(-128)), x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
#else
enum { LANES = 4, ROWS = 4, PANELS = 1 };
typedef int32_t vec __attribute__((vector_size(16)));
static inline vec all(int32_t v) { return (vec){v, v, v, v}; }
static inline vec load(const uint8_t *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(int32_t *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec dot4(vec sum, vec w, vec x) {
  for (int i = 0; i < 4; i++) sum += ((w >> 8 * i) & 255) * (x << (24 - 8 * i) >> 24);
  return sum;
}
#endif
#if defined(SIGNED_WEIGHTS)
enum { PLUS = 0 };
#else
enum { PLUS = 128 };  // what dot4 sees added to a weight
#endif
enum { WIDTH = 16 * PANELS, VECS = WIDTH / LANES, PER = 16 / LANES };

typedef int32_t __attribute__((may_alias)) word;

// x * 127 / max |x| rounded, zeros up to k; in a second row, if asked for, what rounding left, times 254. Their sums.
static void quantize_row(const float *x, int d, int k, int digits, int8_t *q, float *scale, int32_t *sums) {
  int32_t most = 0;  // the bits of |x| are ordered as |x| is, and NaN stands above all: it spoils the row, unhidden
  for (int i = 0; i < d; i++) {
    int32_t bits = ((const word *)x)[i] & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float top;
  memcpy(&top, &most, sizeof top);
  float inverse = top > 0 ? 127 / top : 0;
  int32_t sum = 0, rest = 0;
  for (int i = 0; i < d; i++) {
    int32_t v = (int32_t)rintf(x[i] * inverse);
    q[i] = (int8_t)v;
    sum += v;
  }
  if (digits == 2)
    for (int i = 0; i < d; i++) {
      int32_t v = (int32_t)rintf((x[i] * inverse - q[i]) * 254);
      q[k + i] = (int8_t)v;
      rest += v;
    }
  for (int i = 0; i < digits; i++) memset(q + i * k + d, 0, k - d);
  *scale = top / 127;
  sums[0] = sum;
  if (digits == 2) sums[1] = rest;
}

// Sums of `rows` (a constant) rows of x with PANELS panels of w.
static inline __attribute__((always_inline)) void dots(const int rows, const uint8_t *w, const int8_t *x,
                                                       const int32_t *sums, int k, int32_t out[][WIDTH]) {
  vec acc[ROWS][VECS];
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) acc[m][v] = all(-PLUS * sums[m]);
  for (int i = 0; i < k; i += 4) {
    vec weights[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) weights[v] = load(w + (int64_t)(v / PER) * 16 * k + 16 * i + v % PER * 4 * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
      int32_t four;
      memcpy(&four, x + (int64_t)m * k + i, 4);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; v++) acc[m][v] = dot4(acc[m][v], weights[v], all(four));
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) store(out[m] + v * LANES, acc[m][v]);
}

static int some_dots(int rows, const uint8_t *w, const int8_t *x, const int32_t *sums, int k, int32_t out[][WIDTH]) {
  if (rows >= ROWS) return dots(ROWS, w, x, sums, k, out), ROWS;
  if (rows >= 4) return dots(4, w, x, sums, k, out), 4;
  if (rows >= 2) return dots(2, w, x, sums, k, out), 2;
  return dots(1, w, x, sums, k, out), 1;
}

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
enum { TILE = 16, AMX_ROWS = 2 * TILE };

static int amx_ready(void) {  // Linux lends a process the tiles when asked
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  static int state = -1;
  if (state < 0) state = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return state;
}

static void tiles_on(void) {  // eight tiles of 16 rows of 64 bytes
  struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = TILE;
  _tile_loadconfig(&config);
}

// 32 rows of x with 2 panels; -128 sum(x) is still to be added.
static void amx_dots(const uint8_t *w, const int8_t *x, int k, int32_t out[][WIDTH]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < k; i += 64) {
    _tile_loadd(4, x + i, k);
    _tile_loadd(5, x + (int64_t)TILE * k + i, k);
    _tile_loadd(6, w + 16 * i, 64);
    _tile_loadd(7, w + (int64_t)16 * k + 16 * i, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, out[0], 4 * WIDTH);
  _tile_stored(1, out[0] + 16, 4 * WIDTH);
  _tile_stored(2, out[TILE], 4 * WIDTH);
  _tile_stored(3, out[TILE] + 16, 4 * WIDTH);
}
#else
enum { AMX_ROWS = ROWS };
static int amx_ready(void) { return 0; }
static void tiles_on(void) {}
static void amx_dots(const uint8_t *w, const int8_t *x, int k, int32_t out[][WIDTH]) { (void)w, (void)x, (void)k, (void)out; }
#endif

// y = scale scales (first digit + second / 254) + bias; offset: what the sums still lack.
static void finish(int digits, const int32_t *sums, const int32_t *offset, float scale, const float *scales,
                   const float *bias, float *y, int n) {
  for (int j = 0; j < n; j++) y[j] = (float)(sums[j] + offset[0]);
  if (digits == 2)
    for (int j = 0; j < n; j++) y[j] += (float)(sums[WIDTH + j] + offset[1]) * (1 / 254.0f);
  for (int j = 0; j < n; j++) y[j] *= scale * scales[j];
  if (bias)
    for (int j = 0; j < n; j++) y[j] += bias[j];
}

// x [n, d], w as above with e rounded up to 32 outputs, scales and bias (or NULL) [e], y [n, e]. digits: 1 or 2, the
// numbers that a number of x becomes. scratch: n * digits rounded up to 32, times k + 8 bytes. amx: integer rows from which
// tiles are used.
void int8_linear(const float *x, const uint8_t *w, const float *scales, const float *bias, float *y, uint8_t *scratch,
                 int n, int d, int k, int e, int digits, int amx, int threads) {
  int rows = n * digits, padded = (rows + 31) / 32 * 32, tiled = rows >= amx && amx_ready();
  int8_t *q = (int8_t *)scratch;
  int32_t *sums = (int32_t *)(q + (int64_t)padded * k);
  float *row_scales = (float *)(sums + padded);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int m = 0; m < n; m++)
      quantize_row(x + (int64_t)m * d, d, k, digits, q + (int64_t)m * digits * k, row_scales + m, sums + m * digits);
    if (tiled) tiles_on();
#pragma omp for nowait
    for (int j = 0; j < e; j += WIDTH) {
      int32_t out[AMX_ROWS][WIDTH];
      const uint8_t *panel = w + (int64_t)j * k;
      int wide = e - j < WIDTH ? e - j : WIDTH;
      for (int r = 0, did; r < rows; r += did) {
        if (tiled) amx_dots(panel, q + (int64_t)r * k, k, out), did = AMX_ROWS < rows - r ? AMX_ROWS : rows - r;
        else did = some_dots(rows - r, panel, q + (int64_t)r * k, sums + r, k, out);
        for (int i = 0; i < did; i += digits) {
          int32_t offset[2] = {0, 0};
          for (int c = 0; tiled && c < digits; c++) offset[c] = -PLUS * sums[r + i + c];
          int m = (r + i) / digits;
          finish(digits, out[i], offset, row_scales[m], scales + j, bias ? bias + j : NULL, y + (int64_t)m * e + j, wide);
        }
      }
    }
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
    if (tiled) _tile_release();
#endif
  }
}
