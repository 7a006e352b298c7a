// What answering needs beside torch's products, fp32: the steps between two matrices of a block, attention over a paged
// cache, and products of a few rows with a large matrix. Plain twins: ops/paged.py, ops/norm.py, ops/swiglu.py.
// A row's result never depends on the rows beside it.
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { W = 16 };
#else
enum { W = 8 };
#endif
typedef float vec __attribute__((vector_size(W * sizeof(float))));  // a register of numbers
typedef float unaligned_vec __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const unaligned_vec *)p; }
typedef float four __attribute__((vector_size(16)));
typedef int four_ints __attribute__((vector_size(16)));
#ifdef __clang__
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (four_ints){i, j, k, l})
#endif

static inline four quarter(vec v) {  // the register folded to 4 sums
  four part[W / 4];
  memcpy(part, &v, sizeof v);
  return W == 16 ? (part[0] + part[2]) + (part[1] + part[3]) : part[0] + part[1];
}
static inline four totals(vec a, vec b, vec c, vec d) {
  four p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
  four u = PICK(p, q, 0, 4, 1, 5) + PICK(p, q, 2, 6, 3, 7), v = PICK(r, s, 0, 4, 1, 5) + PICK(r, s, 2, 6, 3, 7);
  return PICK(u, v, 0, 1, 4, 5) + PICK(u, v, 2, 3, 6, 7);
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

// Inner products of a query with 4 keys, or with as many as are left of a block; keys beyond the sequence's end may be
// anything, and so are their products, which nobody reads.
static inline void dots(const float *q, const float *k, float *out, int d, int left) {
  if (left < 4) {
    for (int t = 0; t < left; t++) {
      out[t] = 0;
      for (int i = 0; i < d; i++) out[t] += q[i] * k[t * d + i];
    }
    return;
  }
  vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
  int i = 0;
  for (; i + W <= d; i += W) {
    vec b = load(q + i);
    a0 += b * load(k + i), a1 += b * load(k + d + i), a2 += b * load(k + 2 * d + i), a3 += b * load(k + 3 * d + i);
  }
  four s = totals(a0, a1, a2, a3);
  for (; i < d; i++)
    for (int t = 0; t < 4; t++) s[t] += q[i] * k[t * d + i];
  memcpy(out, &s, sizeof s);
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define MIXES
#endif
#endif
#ifdef MIXES
// W registers' sums in one, that of a[j] in lane j: neighbours are interleaved and added until one is left.
#define MIX(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#ifdef __AVX512F__
#define EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define EVEN_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define ODD_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define EVEN_FOURS 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define ODD_FOURS 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_EIGHT 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_EIGHT 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#else
#define EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define ODD 1, 9, 3, 11, 5, 13, 7, 15
#define EVEN_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define ODD_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
#define EVEN_FOURS 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_FOURS 4, 5, 6, 7, 12, 13, 14, 15
#endif
static inline vec sums(vec *a) {
  for (int k = 0; k < W / 2; k++) a[k] = MIX(a[2 * k], a[2 * k + 1], EVEN) + MIX(a[2 * k], a[2 * k + 1], ODD);
  for (int k = 0; k < W / 4; k++) a[k] = MIX(a[2 * k], a[2 * k + 1], EVEN_PAIRS) + MIX(a[2 * k], a[2 * k + 1], ODD_PAIRS);
  for (int k = 0; k < W / 8; k++) a[k] = MIX(a[2 * k], a[2 * k + 1], EVEN_FOURS) + MIX(a[2 * k], a[2 * k + 1], ODD_FOURS);
#ifdef __AVX512F__
  a[0] = MIX(a[0], a[1], LOW_EIGHT) + MIX(a[0], a[1], HIGH_EIGHT);
#endif
  return a[0];
}

// e^x for x <= 0, to a unit in the last place or two: 2^n by the exponent's bits, the rest by its series.
typedef int ints __attribute__((vector_size(W * sizeof(int))));
static inline vec exp_of(vec x) {
  ints tiny = x < -87.0f;
  x = (vec)(((ints)x & ~tiny) | ((ints)((vec){0} - 87.0f) & tiny));
  ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
  vec whole = __builtin_convertvector(n, vec), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec y = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666655e-1f + r * (4.16666456e-2f + r * (8.33345205e-3f + r * 1.39819994e-3f)))));
  return y * (vec)((n + 127) << 23);
}

// One query over one sequence: blocks of `size` tokens, a multiple of W, and d = D registers. Scores of W tokens are one
// register; what is summed over the values stays in registers.
#define QUERY(D)                                                                                                      \
  static void query##D(const float *q, const float *keys, const float *values, const int32_t *table, int length,      \
                       float *out, int kv_heads, int kv, int size, float scale) {                                     \
    enum { d = D * W };                                                                                               \
    vec sum[D] = {{0}};                                                                                               \
    float top = -1e30f, weight_sum = 0, p[64];                                                                        \
    for (int start = 0, b = 0; start < length; start += size, b++) {                                                  \
      int tokens = length - start < size ? length - start : size;                                                     \
      const float *k = keys + ((int64_t)table[b] * kv_heads + kv) * size * d;                                         \
      const float *v = values + ((int64_t)table[b] * kv_heads + kv) * size * d;                                       \
      for (int t = 0; t < tokens; t += W) {                                                                           \
        vec a[W];                                                                                                     \
        _Pragma("GCC unroll 16") for (int j = 0; j < W; j++) {                                                        \
          const float *key = k + (t + j) * d;                                                                         \
          a[j] = load(q) * load(key);                                                                                 \
          _Pragma("GCC unroll 8") for (int i = 1; i < D; i++) a[j] += load(q + i * W) * load(key + i * W);            \
        }                                                                                                             \
        *(unaligned_vec *)(p + t) = sums(a) * scale;                                                                  \
      }                                                                                                               \
      for (int t = tokens; t < (tokens + W - 1) / W * W; t++) p[t] = -1e30f;                                          \
      float best = top;                                                                                               \
      for (int t = 0; t < tokens; t++) best = p[t] > best ? p[t] : best;                                              \
      vec parts = {0};                                                                                                \
      for (int t = 0; t < tokens; t += W) {                                                                           \
        vec e = exp_of(load(p + t) - best);                                                                           \
        *(unaligned_vec *)(p + t) = e;                                                                                \
        parts += e;                                                                                                   \
      }                                                                                                               \
      float total = 0;                                                                                                \
      for (int j = 0; j < W; j++) total += parts[j];                                                                  \
      float shrink = expf(top - best);                                                                                \
      weight_sum = weight_sum * shrink + total;                                                                       \
      _Pragma("GCC unroll 8") for (int i = 0; i < D; i++) sum[i] *= shrink;                                           \
      vec odd[D] = {{0}}; /* two chains of additions instead of one long one */                                       \
      int t = 0;                                                                                                      \
      for (; t + 2 <= tokens; t += 2)                                                                                 \
        _Pragma("GCC unroll 8") for (int i = 0; i < D; i++) {                                                         \
          sum[i] += p[t] * load(v + t * d + i * W);                                                                   \
          odd[i] += p[t + 1] * load(v + (t + 1) * d + i * W);                                                         \
        }                                                                                                             \
      if (t < tokens)                                                                                                 \
        _Pragma("GCC unroll 8") for (int i = 0; i < D; i++) sum[i] += p[t] * load(v + t * d + i * W);                 \
      _Pragma("GCC unroll 8") for (int i = 0; i < D; i++) sum[i] += odd[i];                                           \
      top = best;                                                                                                     \
    }                                                                                                                 \
    for (int i = 0; i < D; i++) *(unaligned_vec *)(out + i * W) = sum[i] / weight_sum;                                \
  }
typedef void query(const float *, const float *, const float *, const int32_t *, int, float *, int, int, int, float);
QUERY(2) QUERY(4) QUERY(5) QUERY(6) QUERY(8)
static query *query_for(int d, int size) {
  if (size % W || size > 64) return NULL;
  return d == 2 * W   ? query2
         : d == 4 * W ? query4
         : d == 5 * W ? query5
         : d == 6 * W ? query6
         : d == 8 * W ? query8
                      : NULL;
}
#else
typedef void query(const float *, const float *, const float *, const int32_t *, int, float *, int, int, int, float);
static query *query_for(int d, int size) { return NULL; }
#endif

// softmax(q k^T scale) v for n single queries: q, out [n, H, d]; query r belongs to sequence of[r] and sees its first
// lengths[r] tokens, which lie in the blocks that tables [sequences, width] names. d at most 256.
void paged_attention(const float *q, const float *keys, const float *values, const int32_t *tables, const int32_t *of,
                     const int32_t *lengths, float *out, int n, int heads, int kv_heads, int d, int size, int width,
                     float scale) {
  int group = heads / kv_heads;
  query *fast = query_for(d, size);
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int row = 0; row < n; row++)
    for (int kv = 0; kv < kv_heads; kv++) {
      const int32_t *table = tables + (int64_t)of[row] * width;
      int length = lengths[row];
      for (int h = kv * group; h < (kv + 1) * group; h++) {
        const float *query = q + ((int64_t)row * heads + h) * d;
        if (fast) {
          fast(query, keys, values, table, length, out + ((int64_t)row * heads + h) * d, kv_heads, kv, size, scale);
          continue;
        }
        float sum[256] = {0}, top = -1e30f, weight_sum = 0, p[64];
        for (int start = 0, b = 0; start < length; start += size, b++) {  // online softmax, a block at a time
          int tokens = length - start < size ? length - start : size;
          const float *k = keys + ((int64_t)table[b] * kv_heads + kv) * size * d;
          const float *v = values + ((int64_t)table[b] * kv_heads + kv) * size * d;
          float best = top;
          for (int t = 0; t < tokens; t += 4) dots(query, k + t * d, p + t, d, size - t);
          for (int t = 0; t < tokens; t++) {
            p[t] *= scale;
            best = p[t] > best ? p[t] : best;
          }
          float shrink = expf(top - best);
          weight_sum *= shrink;
          for (int i = 0; i < d; i++) sum[i] *= shrink;
          for (int t = 0; t < tokens; t++) p[t] = expf(p[t] - best);
          for (int t = 0; t < tokens; t++) weight_sum += p[t];
          int t = 0;
          for (; t + 4 <= tokens; t += 4) {
            const float *v0 = v + t * d, *v1 = v0 + d, *v2 = v1 + d, *v3 = v2 + d;
            for (int i = 0; i < d; i++) sum[i] += p[t] * v0[i] + p[t + 1] * v1[i] + p[t + 2] * v2[i] + p[t + 3] * v3[i];
          }
          for (; t < tokens; t++)
            for (int i = 0; i < d; i++) sum[i] += p[t] * v[t * d + i];
          top = best;
        }
        float *o = out + ((int64_t)row * heads + h) * d;
        for (int i = 0; i < d; i++) o[i] = sum[i] / weight_sum;
      }
    }
}

// R rows of x times 4 rows of w: 4 R sums in registers, w read once for all R.
#define TILE(R)                                                                                                \
  static inline void tile##R(const float *x, const float *w, float *out, int in, int64_t stride) {                    \
    const float *w1 = w + in, *w2 = w1 + in, *w3 = w2 + in;                                                           \
    vec a0[R] = {{0}}, a1[R] = {{0}}, a2[R] = {{0}}, a3[R] = {{0}};                                                   \
    int i = 0;                                                                                                        \
    for (; i + W <= in; i += W) {                                                                                     \
      const float *next = w + 4 * (int64_t)in + i; /* of the tile after this one: it lies right behind */             \
      __builtin_prefetch(next), __builtin_prefetch(next + in);                                                        \
      __builtin_prefetch(next + 2 * (int64_t)in), __builtin_prefetch(next + 3 * (int64_t)in);                         \
      vec b0 = load(w + i), b1 = load(w1 + i), b2 = load(w2 + i), b3 = load(w3 + i);                                  \
      _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                           \
        vec xr = load(x + (int64_t)r * in + i);                                                                       \
        a0[r] += xr * b0, a1[r] += xr * b1, a2[r] += xr * b2, a3[r] += xr * b3;                                       \
      }                                                                                                               \
    }                                                                                                                 \
    _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                             \
      four s = totals(a0[r], a1[r], a2[r], a3[r]);                                                                    \
      for (int j = i; j < in; j++)                                                                                    \
        for (int e = 0; e < 4; e++) s[e] += x[(int64_t)r * in + j] * w[(int64_t)e * in + j];                          \
      memcpy(out + r * stride, &s, sizeof s);                                                                         \
    }                                                                                                                 \
  }
TILE(1)
#ifdef __AVX512F__
TILE(4)
enum { R_MOST = 4 };
#define full tile4
#else
TILE(2)
enum { R_MOST = 2 };
#define full tile2
#endif

// The last columns, those that are not four.
static void edge(const float *x, const float *w, float *out, int top, int end, int in, int e, int at) {
  for (int r = top; r < end; r++)
    for (int j = at; j < e; j++) {
      const float *a = x + (int64_t)r * in, *b = w + (int64_t)j * in;
      float s = 0;
      for (int i = 0; i < in; i++) s += a[i] * b[i];
      out[(int64_t)r * e + j] = s;
    }
}

// out [n, e] = x [n, in] @ w^T + bias (or NULL), w [e, in]. w goes by in pieces that a core's second cache holds, x in
// pieces for its first; every sum is made in the same order, however many rows there are.
enum { MOST = 32, BAND = 16 };
void linear(const float *x, const float *w, const float *bias, float *out, int n, int in, int e) {
  int tiles = (e + 3) / 4, threads = omp_get_max_threads();
  int pieces = threads * ((tiles + threads * MOST - 1) / (threads * MOST));  // as many for each thread
#pragma omp parallel for schedule(static) if ((int64_t)e * in > 65536)
  for (int p = 0; p < pieces; p++) {
    int first = (int64_t)tiles * p / pieces, last = (int64_t)tiles * (p + 1) / pieces;
    for (int top = 0; top < n; top += BAND)
      for (int t = first; t < last; t++) {
        int r = top, end = top + BAND < n ? top + BAND : n;
        const float *b = w + (int64_t)t * 4 * in;
        if (t * 4 + 4 > e) {
          edge(x, w, out, top, end, in, e, t * 4);
          continue;
        }
        for (; r + R_MOST <= end; r += R_MOST) full(x + (int64_t)r * in, b, out + (int64_t)r * e + t * 4, in, e);
        for (; r < end; r++) tile1(x + (int64_t)r * in, b, out + (int64_t)r * e + t * 4, in, e);
      }
    if (bias)
      for (int r = 0; r < n; r++)
        for (int j = first * 4; j < last * 4 && j < e; j++) out[(int64_t)r * e + j] += bias[j];
  }
}

// A whole block of the model for a batch: what infer/fused.py does by single calls, in one.
typedef struct {
  const float *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *ffn_norm, *gate_up, *gate_up_bias, *down, *down_bias;
  int hidden, heads, kv_heads, d, wide;
  float eps;
} Block;
typedef struct {
  int n, size, width;
  const float *cosines, *sines;
  const int64_t *slots;
  const int32_t *tables, *of, *lengths;
  float *scratch;  // n * (2 hidden + (3 heads + 2 kv_heads) d + 3 wide) numbers
} Batch;

void block(const Block *m, const Batch *b, float *keys, float *values, float *x) {
  int n = b->n, q_width = m->heads * m->d, qkv_width = q_width + 2 * m->kv_heads * m->d;
  float *h = b->scratch, *delta = h + (int64_t)n * m->hidden, *qkv = delta + (int64_t)n * m->hidden;
  float *q = qkv + (int64_t)n * qkv_width, *heard = q + (int64_t)n * q_width;
  float *gate_up = heard + (int64_t)n * q_width, *gated = gate_up + (int64_t)n * 2 * m->wide;
  add_rms_norm(x, NULL, m->norm, h, n, m->hidden, m->eps);
  linear(h, m->qkv, m->qkv_bias, qkv, n, m->hidden, qkv_width);
  split_turn_store(qkv, m->q_norm, m->k_norm, m->eps, b->cosines, b->sines, b->slots, q, keys, values, n, m->heads,
                   m->kv_heads, m->d, b->size);
  paged_attention(q, keys, values, b->tables, b->of, b->lengths, heard, n, m->heads, m->kv_heads, m->d, b->size, b->width,
                  1.0f / sqrtf(m->d));
  linear(heard, m->o, m->o_bias, delta, n, q_width, m->hidden);
  add_rms_norm(x, delta, m->ffn_norm, h, n, m->hidden, m->eps);
  linear(h, m->gate_up, m->gate_up_bias, gate_up, n, m->hidden, 2 * m->wide);
  silu_mul(gate_up, gated, n, m->wide);
  linear(gated, m->down, m->down_bias, delta, n, m->wide, m->hidden);
  for (int64_t i = 0; i < (int64_t)n * m->hidden; i++) x[i] += delta[i];
}
