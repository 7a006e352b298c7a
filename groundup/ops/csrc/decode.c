// What answering needs beside torch's products, fp32: the steps between two matrices of a block, attention over a paged
// cache, and products of a few rows with a large matrix. Plain twins: ops/paged.py, ops/norm.py, ops/swiglu.py.
// A row's result never depends on the rows beside it.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float vec __attribute__((vector_size(64), aligned(4)));  // 16 numbers; two registers where 8 fit
enum { W = 16 };

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline float total(vec v) {
  float s[W], t = 0;
  memcpy(s, &v, sizeof v);
  for (int i = 0; i < W; i++) t += s[i];
  return t;
}
static inline float rstd_of(const float *x, int d, float eps) {
  float s = 0;
  for (int i = 0; i < d; i++) s += x[i] * x[i];
  return 1.0f / sqrtf(s / d + eps);
}

// x [n, d] += delta (or NULL); out = x / rms(x) * weight
void add_rms_norm(float *x, const float *delta, const float *weight, float *out, int n, int d, float eps) {
#pragma omp parallel for if (n * d > 16384)
  for (int row = 0; row < n; row++) {
    float *a = x + (int64_t)row * d, *b = out + (int64_t)row * d;
    if (delta)
      for (int i = 0; i < d; i++) a[i] += delta[(int64_t)row * d + i];
    float r = rstd_of(a, d, eps);
    for (int i = 0; i < d; i++) b[i] = a[i] * r * weight[i];
  }
}

// out [n, f] = silu(gate) * up, gate_up [n, 2f]
void silu_mul(const float *gate_up, float *out, int n, int f) {
#pragma omp parallel for if (n * f > 16384)
  for (int row = 0; row < n; row++) {
    const float *g = gate_up + (int64_t)row * 2 * f, *u = g + f;
    float *o = out + (int64_t)row * f;
    for (int i = 0; i < f; i++) o[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
  }
}

static void norm_turn(const float *x, const float *weight, float eps, const float *c, const float *s, float *out, int d) {
  float r = weight ? rstd_of(x, d, eps) : 1.0f;
  int half = d / 2;
  for (int i = 0; i < half; i++) {
    float a = x[i] * r, b = x[i + half] * r;
    if (weight) a *= weight[i], b *= weight[i + half];
    out[i] = a * c[i] - b * s[i];
    out[i + half] = b * c[i] + a * s[i];
  }
}

// qkv [n, (H + 2K) d]: normalise (weights or NULL) and turn queries into q [n, H, d], keys into their slots of the cache;
// values into theirs. cos, sin [n, d / 2]; slots [n]: block * size + place; cache [blocks, K, size, d].
void split_turn_store(const float *qkv, const float *q_weight, const float *k_weight, float eps, const float *cosines,
                      const float *sines, const int64_t *slots, float *q, float *keys, float *values, int n, int heads,
                      int kv_heads, int d, int size) {
#pragma omp parallel for if (n > 8)
  for (int row = 0; row < n; row++) {
    const float *in = qkv + (int64_t)row * (heads + 2 * kv_heads) * d;
    const float *c = cosines + (int64_t)row * (d / 2), *s = sines + (int64_t)row * (d / 2);
    for (int h = 0; h < heads; h++) norm_turn(in + h * d, q_weight, eps, c, s, q + ((int64_t)row * heads + h) * d, d);
    int64_t block = slots[row] / size, place = slots[row] % size;
    for (int h = 0; h < kv_heads; h++) {
      int64_t at = ((block * kv_heads + h) * size + place) * d;
      norm_turn(in + (heads + h) * d, k_weight, eps, c, s, keys + at, d);
      memcpy(values + at, in + (heads + kv_heads + h) * d, d * sizeof(float));
    }
  }
}

// softmax(q k^T scale) v for n single queries: q, out [n, H, d]; query r belongs to sequence of[r] and sees its first
// lengths[r] tokens, which lie in the blocks that tables [sequences, width] names. d at most 256.
void paged_attention(const float *q, const float *keys, const float *values, const int32_t *tables, const int32_t *of,
                     const int32_t *lengths, float *out, int n, int heads, int kv_heads, int d, int size, int width,
                     float scale) {
  int group = heads / kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int row = 0; row < n; row++)
    for (int kv = 0; kv < kv_heads; kv++) {
      const int32_t *table = tables + (int64_t)of[row] * width;
      int length = lengths[row];
      for (int h = kv * group; h < (kv + 1) * group; h++) {
        const float *query = q + ((int64_t)row * heads + h) * d;
        float sum[256] = {0}, top = -INFINITY, weight_sum = 0, p[64];
        for (int start = 0, b = 0; start < length; start += size, b++) {  // online softmax, a block at a time
          int tokens = length - start < size ? length - start : size;
          const float *k = keys + ((int64_t)table[b] * kv_heads + kv) * size * d;
          const float *v = values + ((int64_t)table[b] * kv_heads + kv) * size * d;
          float best = top;
          for (int t = 0; t < tokens; t++) {
            float dot = 0;
            for (int i = 0; i < d; i++) dot += query[i] * k[t * d + i];
            p[t] = dot * scale;
            best = p[t] > best ? p[t] : best;
          }
          float shrink = expf(top - best);
          weight_sum *= shrink;
          for (int i = 0; i < d; i++) sum[i] *= shrink;
          for (int t = 0; t < tokens; t++) p[t] = expf(p[t] - best);
          for (int t = 0; t < tokens; t++) {
            weight_sum += p[t];
            for (int i = 0; i < d; i++) sum[i] += p[t] * v[t * d + i];
          }
          top = best;
        }
        float *o = out + ((int64_t)row * heads + h) * d;
        for (int i = 0; i < d; i++) o[i] = sum[i] / weight_sum;
      }
    }
}

// A tile of R rows of x times 4 rows of w, each an inner product over `in`.
#define TILE(R)                                                                                        \
  static inline void tile##R(const float *x, const float *w, float *out, int in, int out_stride, int e4) { \
    vec a[R][4] = {{{0}}};                                                                             \
    int i = 0;                                                                                         \
    for (; i + W <= in; i += W) {                                                                      \
      vec w0 = load(w + i), w1 = load(w + in + i), w2 = load(w + 2 * (int64_t)in + i),                 \
          w3 = load(w + 3 * (int64_t)in + i);                                                          \
      for (int r = 0; r < R; r++) {                                                                    \
        vec xr = load(x + (int64_t)r * in + i);                                                        \
        a[r][0] += xr * w0, a[r][1] += xr * w1, a[r][2] += xr * w2, a[r][3] += xr * w3;                \
      }                                                                                                \
    }                                                                                                  \
    for (int r = 0; r < R; r++)                                                                        \
      for (int e = 0; e < 4; e++) {                                                                    \
        float s = total(a[r][e]);                                                                      \
        for (int j = i; j < in; j++) s += x[(int64_t)r * in + j] * w[(int64_t)e * in + j];             \
        out[(int64_t)r * out_stride + e4 + e] = s;                                                     \
      }                                                                                                \
  }
TILE(1)
TILE(2)
TILE(4)

// out [n, e] = x [n, in] @ w^T + bias (or NULL), w [e, in]: for few rows, where reading w once is all that costs.
void linear(const float *x, const float *w, const float *bias, float *out, int n, int in, int e) {
  int tiles = e / 4;
#pragma omp parallel for schedule(static) if ((int64_t)e * in > 65536)
  for (int t = 0; t < tiles + 1; t++) {
    if (t == tiles) {  // the last e % 4
      for (int j = tiles * 4; j < e; j++)
        for (int r = 0; r < n; r++) {
          float s = 0;
          for (int i = 0; i < in; i++) s += x[(int64_t)r * in + i] * w[(int64_t)j * in + i];
          out[(int64_t)r * e + j] = s + (bias ? bias[j] : 0);
        }
      continue;
    }
    const float *rows = w + (int64_t)t * 4 * in;
    int r = 0;
    for (; r + 4 <= n; r += 4) tile4(x + (int64_t)r * in, rows, out + (int64_t)r * e, in, e, t * 4);
    for (; r + 2 <= n; r += 2) tile2(x + (int64_t)r * in, rows, out + (int64_t)r * e, in, e, t * 4);
    for (; r < n; r++) tile1(x + (int64_t)r * in, rows, out + (int64_t)r * e, in, e, t * 4);
    if (bias)
      for (int k = 0; k < n; k++)
        for (int j = t * 4; j < t * 4 + 4; j++) out[(int64_t)k * e + j] += bias[j];
  }
}
