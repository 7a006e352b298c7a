// What stands between two products of a training step, each in one pass over the tokens. Plain twins: ops/norm.py
// (normalize, normalize_backward) and ops/swiglu.py (swiglu, swiglu_backward).
#include <math.h>
#include <stdint.h>

// x_hat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps): x, x_hat [n, d], rstd [n]
void normalize(const float *x, float *x_hat, float *rstd, float eps, int64_t n, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n; row++) {
    const float *from = x + row * d;
    float *to = x_hat + row * d, sum = 0;
    for (int64_t i = 0; i < d; i++) sum += from[i] * from[i];
    rstd[row] = 1.0f / sqrtf(sum / d + eps);
    for (int64_t i = 0; i < d; i++) to[i] = from[i] * rstd[row];
  }
}

// grad = beside + rstd * (grad - x_hat * mean(grad * x_hat)), in place: from x_hat's gradient and the residual's to x's
void normalize_backward(float *grad, const float *x_hat, const float *rstd, const float *beside, int64_t n, int64_t d,
                        int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n; row++) {
    float *g = grad + row * d, along = 0;
    const float *h = x_hat + row * d, *b = beside + row * d, r = rstd[row];
    for (int64_t i = 0; i < d; i++) along += g[i] * h[i];
    along /= d;
    for (int64_t i = 0; i < d; i++) g[i] = b[i] + r * (g[i] - h[i] * along);
  }
}

// out [n, f] = silu(gate) * up, gate_up [n, 2f]
void swiglu(const float *gate_up, float *out, int64_t n, int64_t f, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n; row++) {
    const float *g = gate_up + row * 2 * f, *u = g + f;
    float *o = out + row * f;
    for (int64_t i = 0; i < f; i++) o[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
  }
}

static void row_backward(const float *restrict g, const float *restrict u, const float *restrict d, float *restrict o,
                         float *restrict dg, float *restrict du, int64_t f) {
  for (int64_t i = 0; i < f; i++) {
    float sigma = 1.0f / (1.0f + expf(-g[i])), silu = g[i] * sigma, product = silu * u[i];
    o[i] = product;
    du[i] = d[i] * silu;
    dg[i] = d[i] * (product + sigma * (u[i] - product));  // the slope of silu: ops/swiglu.py
  }
}

// dgate_up from dout; out as above, made again
void swiglu_backward(const float *gate_up, const float *dout, float *out, float *dgate_up, int64_t n, int64_t f,
                     int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < n; row++) {
    const float *g = gate_up + row * 2 * f;
    float *dg = dgate_up + row * 2 * f;
    row_backward(g, g + f, dout + row * f, out + row * f, dg, dg + f, f);
  }
}
