/* The backward pass: gradients of the feature maps, the logits and the hidden values. */
#pragma once
#include "native_forward.h"

/* ------------------------------------------------------------------------------------------------------ backward -- */

/* Compute dz = out <= 0 ? 0 : dout over n values, and the sum of dz * m. Without `out`, dz is dout and is not written. */
INLINE float reduced_row(const float *restrict dout, const float *restrict out, const float *restrict y,
                         float *restrict dz, int64_t n, int relu_in) {
    float sums[LANES] = {0}, sum = 0;
    int64_t i = 0;
    if (out && !relu_in)
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float z = out[i + j] <= 0 ? 0 : dout[i + j];
                dz[i + j] = z;
                sums[j] += ROUNDED(z * y[i + j]);
            }
    else if (!out && relu_in)
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) sums[j] += ROUNDED(dout[i + j] * positive(y[i + j]));
    else if (!out)
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) sums[j] += ROUNDED(dout[i + j] * y[i + j]);
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < LANES; j++) sum += sums[j];
    for (; i < n; i++) {
        float z = out && out[i] <= 0 ? 0 : dout[i];
        if (out) dz[i] = z;
        sum += ROUNDED(z * (relu_in ? positive(y[i]) : y[i]));
    }
    return sum;
}

/* The same for one position: each of its n channels has its own sum. */
INLINE void reduced_position(const float *restrict dout, const float *restrict out, const float *restrict y,
                                    float *restrict dz, float *restrict sums, int64_t n, int relu_in) {
    if (out && !relu_in)
        for (int64_t i = 0; i < n; i++) {
            float z = out[i] <= 0 ? 0 : dout[i];
            dz[i] = z;
            sums[i] += ROUNDED(z * y[i]);
        }
    else if (out)
        for (int64_t i = 0; i < n; i++) {
            float z = out[i] <= 0 ? 0 : dout[i];
            dz[i] = z;
            sums[i] += ROUNDED(z * positive(y[i]));
        }
    else
        for (int64_t i = 0; i < n; i++) sums[i] += ROUNDED(dout[i] * (relu_in ? positive(y[i]) : y[i]));
}

INLINE void spread_row(const float *dz, const float *y, float *dy, int64_t n, float g, float ds, int relu_in) {
    if (relu_in)
        for (int64_t i = 0; i < n; i++) dy[i] = y[i] <= 0 ? 0 : ROUNDED(dz[i] * g) + ds;
    else
        for (int64_t i = 0; i < n; i++) dy[i] = ROUNDED(dz[i] * g) + ds;
}

INLINE void spread_position(const float *dz, const float *y, float *dy, int64_t n, const float *g,
                                   const float *ds, int relu_in) {
    if (relu_in)
        for (int64_t i = 0; i < n; i++) dy[i] = y[i] <= 0 ? 0 : ROUNDED(dz[i] * g[i]) + ds[i];
    else
        for (int64_t i = 0; i < n; i++) dy[i] = ROUNDED(dz[i] * g[i]) + ds[i];
}

/* dv = dg * scale * gate'(v), multiplied in torch's order */
INLINE void gate_gradients(const float *restrict v, float *restrict dg, int64_t n, int kind, float scale) {
    if (kind == GATE_SIGMOID)
        for (int64_t i = 0; i < n; i++) {
            float s = sigmoid(v[i]);
            dg[i] = dg[i] * scale * (1 - s) * s;
        }
    else
        for (int64_t i = 0; i < n; i++) dg[i] = v[i] > -3 && v[i] < 3 ? dg[i] * scale / 6 : 0;
}

INLINE void activation_gradients(const float *restrict u, float *restrict dh, int64_t n, int kind) {
    if (kind == ACT_RELU)
        for (int64_t i = 0; i < n; i++) dh[i] = u[i] <= 0 ? 0 : dh[i];
    else
        for (int64_t i = 0; i < n; i++) {
            float s = sigmoid(u[i]);
            dh[i] *= s * (1 + u[i] * (1 - s));
        }
}

/* out += factor * row */
INLINE void add_scaled(const float *restrict row, float *restrict out, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) out[i] += factor * row[i];
}

typedef struct {
    const float *dout, *out, *y, *kept;
    float *dz, *dy, *dv, *du; /* dz: null without a final ReLU; dv (N, C), du (N, K) */
} Gradients;

/* Process one image; `ds` has room for 2 C: the means' gradients and the gates. */
CLONES static void image_backward(const Shape *d, const Layers *l, const Gradients *m, int64_t n, float *ds) {
    const int64_t C = d->channels, P = d->positions, K = d->hidden, size = C * P;
    const float *dout = m->dout + n * size, *y = m->y + n * size, *out = m->out ? m->out + n * size : 0;
    const float *u = m->kept + n * (2 * C + K) + C, *v = u + K;
    float *g = ds + C, *dz = m->dz ? m->dz + n * size : 0, *dy = m->dy + n * size, *dv = m->dv + n * C, *du = m->du + n * K;
    if (d->nhwc) {
        for (int64_t c = 0; c < C; c++) dv[c] = 0;
        for (int64_t p = 0; p < P; p += FLUSH) {
            memset(ds, 0, C * sizeof(float));
            for (int64_t q = p; q < P && q < p + FLUSH; q++) {
                const int64_t at = q * C;
                reduced_position(dout + at, out ? out + at : out, y + at, dz ? dz + at : dz, ds, C, d->pre);
            }
            for (int64_t c = 0; c < C; c++) dv[c] += ds[c];
        }
    } else
        for (int64_t c = 0; c < C; c++) {
            const int64_t at = c * P;
            dv[c] = reduced_row(dout + at, out ? out + at : out, y + at, dz ? dz + at : dz, P, d->pre);
        }
    gate_gradients(v, dv, C, d->gate, d->scale);
    memset(du, 0, K * sizeof(float));
    for (int64_t c = 0; c < C; c++) add_scaled(l->w2 + c * K, du, K, dv[c]);
    activation_gradients(u, du, K, d->activation);
    memset(ds, 0, C * sizeof(float));
    for (int64_t k = 0; k < K; k++) add_scaled(l->w1 + k * C, ds, C, du[k]);
    for (int64_t c = 0; c < C; c++) ds[c] /= P;
    gates(v, g, C, d->gate, d->scale, d->offset);
    const float *from = dz ? dz : dout;
    if (d->nhwc)
        for (int64_t at = 0; at < size; at += C) spread_position(from + at, y + at, dy + at, C, g, ds, d->pre);
    else
        for (int64_t c = 0, at = 0; c < C; c++, at += P) spread_row(from + at, y + at, dy + at, P, g[c], ds[c], d->pre);
}

static int backward(const Shape *d, const Layers *l, const Gradients *m) {
    int failed = 0;
#pragma omp parallel num_threads(d->threads) if (d->threads > 1)
    {
        float *ds = malloc((2 * d->channels + 1) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < d->images; n++) {
            if (ds)
                image_backward(d, l, m, n, ds);
            else
                failed = 1;
        }
        free(ds);
    }
    return failed;
}
