/* The forward pass. Images are processed one by one, so that a feature map is still cached when it is read again. */
#pragma once
#include "native_math.h"

/* ------------------------------------------------------------------------------------------------------- squeeze -- */

/* Sum n values at x into `sum`, in `width` independent partial sums. */
#define GROUPED(width, value)                                          \
    float sums[width] = {0};                                           \
    for (; i + width <= n; i += width)                                 \
        for (int j = 0; j < width; j++) sums[j] += value(x[i + j]);    \
    for (int half = width / 2; half >= 8; half /= 2)                   \
        for (int j = 0; j < half; j++) sums[j] += sums[j + half];      \
    for (int j = 0; j < 4; j++) sums[j] += sums[j + 4];                \
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);                   \
    for (; i < n; i++) sum += value(x[i]);

#define ITSELF(x) (x)
#define RECTIFIED(x) positive(a * (x) + b)
#define HARDSWISHED(x) hardswish(a * (x) + b)

/* Sum x or, with an activation, activation(a x + b). Long rows need many partial sums to hide the latency of an addition;
 * for short rows adding up the partial sums would dominate. */
INLINE float row_sum(const float *restrict x, int64_t n, float a, float b, int kind) {
    float sum;
    int64_t i = 0;
    const int long_enough = n >= 4 * LANES;
    if (kind == RELU && long_enough) {
        GROUPED(LANES, RECTIFIED)
    } else if (kind == RELU) {
        GROUPED(16, RECTIFIED)
    } else if (kind == HARDSWISH) {
        GROUPED(16, HARDSWISHED)
    } else if (long_enough) {
        GROUPED(LANES, ITSELF)
    } else {
        GROUPED(16, ITSELF)
    }
    return sum;
}

/* Add `rows` positions, `stride` apart, to the sums of n channels: x or, with an activation, activation(a x + b). */
INLINE void add_rows(const float *restrict x, float *restrict sums, int64_t rows, int64_t stride, int64_t n,
                     const float *restrict a, const float *restrict b, int kind) {
#define FOUR_ROWS(value)             \
    for (int64_t i = 0; i < n; i++) \
        sums[i] += (value(x[i]) + value(x[stride + i])) + (value(x[2 * stride + i]) + value(x[3 * stride + i]));
#define RECTIFIED_AT(x) positive(a[i] * (x) + b[i])
#define HARDSWISHED_AT(x) hardswish(a[i] * (x) + b[i])
    int64_t p = 0;
    for (; p + 4 <= rows; p += 4, x += 4 * stride)
        if (kind == RELU) {
            FOUR_ROWS(RECTIFIED_AT)
        } else if (kind == HARDSWISH) {
            FOUR_ROWS(HARDSWISHED_AT)
        } else {
            FOUR_ROWS(ITSELF)
        }
    for (; p < rows; p++, x += stride)
        for (int64_t i = 0; i < n; i++) sums[i] += kind ? activated(a[i] * x[i] + b[i], kind) : x[i];
}

/* Prefetch the weights of these channels: they arrive from memory while the feature map is read. */
INLINE void prefetch(const float *weights, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(weights + i, 0, 2);
}

/* Compute the means of channels [from, to) of one image; `partial` has room for all channels. */
CLONES static void squeeze(const Shape *d, const Layers *l, Affine to_x, const float *y, float *s, float *partial,
                           int64_t from, int64_t to) {
    const int64_t C = d->channels, P = d->positions, K = d->hidden;
    if (!d->nhwc)
        for (int64_t c = from; c < to; c++) {
            prefetch(l->w1 + c * K, K);
            prefetch(l->w2 + c * K, K);
            s[c] = row_sum(y + c * P, P, to_x.a[c], to_x.b[c], d->pre) / P;
        }
    else {
        for (int64_t c = from; c < to; c++) s[c] = 0;
        for (int64_t p = 0; p < P; p += FLUSH) {
            const int64_t rows = P - p < FLUSH ? P - p : FLUSH;
            memset(partial + from, 0, (to - from) * sizeof(float));
            add_rows(y + p * C + from, partial + from, rows, C, to - from, to_x.a + from, to_x.b + from, d->pre);
            for (int64_t c = from; c < to; c++) s[c] += partial[c];
        }
        for (int64_t c = from; c < to; c++) s[c] /= P;
    }
    /* mean(a x + b) = a mean(x) + b */
    if (!d->pre)
        for (int64_t c = from; c < to; c++) s[c] = to_x.a[c] * s[c] + to_x.b[c];
}

/* ---------------------------------------------------------------------------------------------------- excitation -- */

/* out = w x + bias, for a matrix of rows x n; four rows at a time share the loads of x. */
INLINE void matrix_vector(const float *restrict w, const float *restrict x, const float *restrict bias,
                          float *restrict out, int64_t rows, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4, w += 4 * n) {
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t j = 0; j < n; j++) {
            a += w[j] * x[j];
            b += w[n + j] * x[j];
            c += w[2 * n + j] * x[j];
            d += w[3 * n + j] * x[j];
        }
        out[i] = a, out[i + 1] = b, out[i + 2] = c, out[i + 3] = d;
    }
    for (; i < rows; i++, w += n) {
        float a = 0;
#pragma omp simd reduction(+ : a)
        for (int64_t j = 0; j < n; j++) a += w[j] * x[j];
        out[i] = a;
    }
    if (bias)
        for (i = 0; i < rows; i++) out[i] += bias[i];
}

INLINE void activate(const float *restrict u, float *restrict h, int64_t n, int kind) {
    if (kind == ACT_RELU)
        for (int64_t i = 0; i < n; i++) h[i] = positive(u[i]);
    else
        for (int64_t i = 0; i < n; i++) h[i] = u[i] * sigmoid(u[i]);
}

INLINE void gates(const float *restrict v, float *restrict g, int64_t n, int kind, float scale, float offset) {
    if (kind == GATE_SIGMOID)
        for (int64_t i = 0; i < n; i++) g[i] = scale * sigmoid(v[i]) + offset;
    else
        for (int64_t i = 0; i < n; i++) {
            float x = v[i] / 6 + 0.5f;
            g[i] = scale * (x < 0 ? 0 : x > 1 ? 1 : x) + offset;
        }
}

/* s (C) to u (K), v (C) and g (C) of one image; `h` has room for K. */
CLONES static void excite(const Shape *d, const Layers *l, const float *s, float *u, float *h, float *v, float *g) {
    const int64_t C = d->channels, K = d->hidden;
    matrix_vector(l->w1, s, l->b1, u, K, C);
    activate(u, h, K, d->activation);
    matrix_vector(l->w2, h, l->b2, v, C, K);
    gates(v, g, C, d->gate, d->scale, d->offset);
}

/* ---------------------------------------------------------------------------------------------------------- join -- */

/* Call PASS(shortcut, pre, post) with constants for the combinations that networks use. */
#define FOR_ALL_PASSES(PASS)                                             \
    if (r && !pre && post == RELU) {                                \
        PASS(r[i], NOTHING, RELU)                                        \
    } else if (!r && !pre && !post) {                               \
        PASS(0, NOTHING, NOTHING)                                        \
    } else if (!r && !pre && post == RELU) {                        \
        PASS(0, NOTHING, RELU)                                           \
    } else if (!r && !pre && post == HARDSWISH) {                   \
        PASS(0, NOTHING, HARDSWISH)                                      \
    } else if (!r && !pre && post == SILU) {                        \
        PASS(0, NOTHING, SILU)                                           \
    } else if (!r && pre == RELU && !post) {                        \
        PASS(0, RELU, NOTHING)                                           \
    } else if (!r && pre == HARDSWISH && !post) {                   \
        PASS(0, HARDSWISH, NOTHING)                                      \
    } else {                                                             \
        PASS((r ? r[i] : 0), pre, post)                             \
    }

/* post(f y + c + r) or, with `pre`, post(pre(f y + c) g + r), for the n values of one channel. `out` may be `y` or `r`. */
INLINE void scaled_row(const float *y, const float *r, float *out, int64_t n, float f, float c, float g, int pre,
                       int post) {
#define ROW_PASS(shortcut, first, last)                                                      \
    for (int64_t i = 0; i < n; i++) {                                                        \
        float m = (first) ? activated(y[i] * f + c, first) * g : y[i] * f + c;               \
        out[i] = activated(m + (shortcut), last);                                            \
    }
    FOR_ALL_PASSES(ROW_PASS)
}

/* The same for the n channels of one position. */
INLINE void scaled_position(const float *y, const float *r, float *out, int64_t n, const float *f, const float *c,
                            const float *g, int pre, int post) {
#define POSITION_PASS(shortcut, first, last)                                                       \
    for (int64_t i = 0; i < n; i++) {                                                              \
        float m = (first) ? activated(y[i] * f[i] + c[i], first) * g[i] : y[i] * f[i] + c[i];      \
        out[i] = activated(m + (shortcut), last);                                                  \
    }
    FOR_ALL_PASSES(POSITION_PASS)
}

/* Per channel: the factor f and summand c before the activation, the gate g after it. */
typedef struct {
    const float *f, *c, *g;
} Factors;

/* Channels (NCHW) or positions (NHWC) [from, to) of one image. */
CLONES static void join(const Shape *d, const float *y, const float *r, Factors k, float *out, int64_t from, int64_t to) {
    const int64_t width = d->nhwc ? d->channels : d->positions;
    for (int64_t line = from; line < to; line++) {
        const int64_t at = line * width;
        const float *shortcut = r ? r + at : r;
        if (d->nhwc)
            scaled_position(y + at, shortcut, out + at, width, k.f, k.c, k.g, d->pre, d->post);
        else
            scaled_row(y + at, shortcut, out + at, width, k.f[line], k.c[line], k.g[line], d->pre, d->post);
    }
}

/* Without an activation in between, fold the gate into the BatchNorm; `f` and `c` have room for C. */
CLONES static Factors factors(const Shape *d, Affine to_x, const float *g, float *f, float *c) {
    if (d->pre) return (Factors){to_x.a, to_x.b, g};
    for (int64_t i = 0; i < d->channels; i++) f[i] = to_x.a[i] * g[i], c[i] = to_x.b[i] * g[i];
    return (Factors){f, c, g};
}

/* ------------------------------------------------------------------------------------------------------- forward -- */

typedef struct {
    const float *y, *r;
    float *out, *kept; /* kept: per image s (C), u (K), v (C) for the backward pass; or null */
} Maps;

/* Allocate per thread: partial sums, later f (C), c (C), h (K), g (C), and s, u, v where they are not kept. */
static float *scratch(const Shape *d) { return malloc((5 * d->channels + 2 * d->hidden) * sizeof(float)); }

static void image_forward(const Shape *d, const Layers *l, Affine to_x, const Maps *m, int64_t n, float *room, int shares) {
    const int64_t C = d->channels, K = d->hidden, size = C * d->positions, lines = d->nhwc ? d->positions : C;
    const float *y = m->y + n * size, *r = m->r ? m->r + n * size : 0;
    float *f = room, *c = f + C, *h = c + C, *g = h + K, *s = m->kept ? m->kept + n * (2 * C + K) : g + C;
    float *out = m->out + n * size;
    Factors k = {to_x.a, to_x.b, to_x.a}; /* g is unused without an activation */
    if (d->gated) {
#pragma omp parallel for num_threads(shares) if (shares > 1) schedule(static)
        for (int64_t t = 0; t < shares; t++) squeeze(d, l, to_x, y, s, room, C * t / shares, C * (t + 1) / shares);
        excite(d, l, s, s + C, h, s + C + K, g);
        k = factors(d, to_x, g, f, c);
    }
#pragma omp parallel for num_threads(shares) if (shares > 1) schedule(static)
    for (int64_t t = 0; t < shares; t++) join(d, y, r, k, out, lines * t / shares, lines * (t + 1) / shares);
}

/* Split the images among the threads or, with fewer images than threads, split each image. */
static int forward(const Shape *d, const Layers *l, const Maps *m) {
    const int among_images = d->images >= d->threads;
    float *a = malloc(2 * d->channels * sizeof(float)), *b = a + d->channels;
    int failed = !a;
    if (a) affine(d, l, a, b);
#pragma omp parallel num_threads(d->threads) if (d->threads > 1 && among_images)
    {
        float *room = a ? scratch(d) : 0;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < d->images; n++) {
            if (room)
                image_forward(d, l, (Affine){a, b}, m, n, room, among_images ? 1 : d->threads);
            else
                failed = 1;
        }
        free(room);
    }
    free(a);
    return failed;
}
