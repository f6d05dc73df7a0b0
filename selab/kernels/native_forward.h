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
#define RECTIFIED(x) positive(x)
#define NORMALISED(x) (a * (x) + b)
#define NORMALISED_RECTIFIED(x) positive(a * (x) + b)
#define NORMALISED_HARDSWISHED(x) hardswish(a * (x) + b)
#define NORMALISED_ACTIVATED(x) activated(norm ? a * (x) + b : (x), kind)

/* Sum activation(x) or, with a BatchNorm, activation(a x + b). Each value is computed as torch stores it, so that a sum
 * overflows where torch's does. Long rows need many partial sums to hide the latency of an addition; for short rows adding
 * up the partial sums would dominate. */
INLINE float row_sum(const float *restrict x, int64_t n, int norm, float a, float b, int kind) {
    float sum;
    int64_t i = 0;
    const int long_enough = n >= 4 * LANES;
    if (!norm && !kind && long_enough) {
        GROUPED(LANES, ITSELF)
    } else if (!norm && !kind) {
        GROUPED(16, ITSELF)
    } else if (norm && !kind && long_enough) {
        GROUPED(LANES, NORMALISED)
    } else if (norm && !kind) {
        GROUPED(16, NORMALISED)
    } else if (norm && kind == RELU && long_enough) {
        GROUPED(LANES, NORMALISED_RECTIFIED)
    } else if (norm && kind == RELU) {
        GROUPED(16, NORMALISED_RECTIFIED)
    } else if (norm && kind == HARDSWISH) {
        GROUPED(16, NORMALISED_HARDSWISHED)
    } else if (!norm && kind == RELU && long_enough) {
        GROUPED(LANES, RECTIFIED)
    } else if (!norm && kind == RELU) {
        GROUPED(16, RECTIFIED)
    } else {
        GROUPED(16, NORMALISED_ACTIVATED)
    }
    return sum;
}

/* Add `rows` positions, `stride` apart, to the sums of n channels; the values as in `row_sum`. */
INLINE void add_rows(const float *restrict x, float *restrict sums, int64_t rows, int64_t stride, int64_t n, int norm,
                     const float *restrict a, const float *restrict b, int kind) {
#define FOUR_ROWS(value)             \
    for (int64_t i = 0; i < n; i++) \
        sums[i] += (value(x[i]) + value(x[stride + i])) + (value(x[2 * stride + i]) + value(x[3 * stride + i]));
#define NORMALISED_AT(x) (a[i] * (x) + b[i])
#define NORMALISED_RECTIFIED_AT(x) positive(a[i] * (x) + b[i])
#define NORMALISED_HARDSWISHED_AT(x) hardswish(a[i] * (x) + b[i])
#define NORMALISED_ACTIVATED_AT(x) activated(norm ? a[i] * (x) + b[i] : (x), kind)
    int64_t p = 0;
    for (; p + 4 <= rows; p += 4, x += 4 * stride)
        if (!norm && !kind) {
            FOUR_ROWS(ITSELF)
        } else if (norm && !kind) {
            FOUR_ROWS(NORMALISED_AT)
        } else if (norm && kind == RELU) {
            FOUR_ROWS(NORMALISED_RECTIFIED_AT)
        } else if (norm && kind == HARDSWISH) {
            FOUR_ROWS(NORMALISED_HARDSWISHED_AT)
        } else if (!norm && kind == RELU) {
            FOUR_ROWS(RECTIFIED)
        } else {
            FOUR_ROWS(NORMALISED_ACTIVATED_AT)
        }
    for (; p < rows; p++, x += stride)
        for (int64_t i = 0; i < n; i++) sums[i] += NORMALISED_ACTIVATED_AT(x[i]);
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
            if (K) prefetch(l->w1 + c * K, K);
            if (K) prefetch(l->w2 + c * K, K);
            s[c] = row_sum(y + c * P, P, to_x.norm, to_x.a[c], to_x.b[c], d->pre) / P;
        }
    else {
        for (int64_t c = from; c < to; c++) s[c] = 0;
        for (int64_t p = 0; p < P; p += FLUSH) {
            const int64_t rows = P - p < FLUSH ? P - p : FLUSH;
            memset(partial + from, 0, (to - from) * sizeof(float));
            add_rows(y + p * C + from, partial + from, rows, C, to - from, to_x.norm, to_x.a + from, to_x.b + from, d->pre);
            for (int64_t c = from; c < to; c++) s[c] += partial[c];
        }
        for (int64_t c = from; c < to; c++) s[c] /= P;
    }
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
        for (int64_t i = 0; i < n; i++) h[i] = silu(u[i]);
}

INLINE void gates(const float *restrict v, float *restrict g, int64_t n, int kind, float scale, float offset) {
    if (kind == GATE_SIGMOID)
        for (int64_t i = 0; i < n; i++) g[i] = scale * sigmoid(v[i]) + offset;
    else
        for (int64_t i = 0; i < n; i++) g[i] = scale * hardsigmoid(v[i]) + offset;
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

/* What a pass does: add a shortcut, normalise, activate (`pre`), gate, and activate at the end (`post`). */
typedef struct {
    int shortcut, norm, pre, gated, post;
} Steps;

/* Call PASS(steps) with constants for the combinations that networks use. */
#define FOR_ALL_PASSES(PASS)                                                          \
    const int plain = !k.pre, bare = plain && !k.shortcut;                            \
    if (plain && k.shortcut && !k.norm && k.gated && k.post == RELU) {                \
        PASS(((Steps){1, 0, NOTHING, 1, RELU}))                                       \
    } else if (plain && k.shortcut && k.norm && k.gated && k.post == RELU) {          \
        PASS(((Steps){1, 1, NOTHING, 1, RELU}))                                       \
    } else if (plain && k.shortcut && !k.norm && !k.gated && k.post == RELU) {        \
        PASS(((Steps){1, 0, NOTHING, 0, RELU}))                                       \
    } else if (plain && k.shortcut && k.norm && !k.gated && k.post == RELU) {         \
        PASS(((Steps){1, 1, NOTHING, 0, RELU}))                                       \
    } else if (bare && !k.norm && k.gated && !k.post) {                               \
        PASS(((Steps){0, 0, NOTHING, 1, NOTHING}))                                    \
    } else if (bare && k.norm && k.gated && !k.post) {                                \
        PASS(((Steps){0, 1, NOTHING, 1, NOTHING}))                                    \
    } else if (bare && k.norm && !k.gated && k.post == RELU) {                        \
        PASS(((Steps){0, 1, NOTHING, 0, RELU}))                                       \
    } else if (bare && k.norm && !k.gated && k.post == HARDSWISH) {                   \
        PASS(((Steps){0, 1, NOTHING, 0, HARDSWISH}))                                  \
    } else if (bare && k.norm && !k.gated && k.post == SILU) {                        \
        PASS(((Steps){0, 1, NOTHING, 0, SILU}))                                       \
    } else if (!k.shortcut && !k.norm && k.pre == RELU && k.gated && !k.post) {       \
        PASS(((Steps){0, 0, RELU, 1, NOTHING}))                                       \
    } else if (!k.shortcut && k.norm && k.pre == RELU && k.gated && !k.post) {        \
        PASS(((Steps){0, 1, RELU, 1, NOTHING}))                                       \
    } else if (!k.shortcut && k.norm && k.pre == HARDSWISH && k.gated && !k.post) {   \
        PASS(((Steps){0, 1, HARDSWISH, 1, NOTHING}))                                  \
    } else {                                                                          \
        PASS(k)                                                                       \
    }

/* post(pre(a y + b) g + r) of one value, without the steps that `k` lacks. */
INLINE float passed(float y, float r, float a, float b, float g, Steps k) {
    float m = activated(k.norm ? y * a + b : y, k.pre);
    m = k.gated ? ROUNDED(m * g) : m;
    return activated(k.shortcut ? m + r : m, k.post);
}

/* The n values of one channel. `out` may be `y` or `r`. */
INLINE void passed_row(const float *y, const float *r, float *out, int64_t n, float a, float b, float g, Steps k) {
#define ROW_PASS(k) \
    for (int64_t i = 0; i < n; i++) out[i] = passed(y[i], k.shortcut ? r[i] : 0, a, b, g, k);
    FOR_ALL_PASSES(ROW_PASS)
}

/* The n channels of one position. */
INLINE void passed_position(const float *y, const float *r, float *out, int64_t n, const float *a, const float *b,
                            const float *g, Steps k) {
#define POSITION_PASS(k)            \
    for (int64_t i = 0; i < n; i++) \
        out[i] = passed(y[i], k.shortcut ? r[i] : 0, k.norm ? a[i] : 1, k.norm ? b[i] : 0, k.gated ? g[i] : 1, k);
    FOR_ALL_PASSES(POSITION_PASS)
}

/* Channels (NCHW) or positions (NHWC) [from, to) of one image. */
CLONES static void join(const Shape *d, const float *y, const float *r, Affine to_x, const float *g, float *out,
                        int64_t from, int64_t to) {
    const int64_t width = d->nhwc ? d->channels : d->positions;
    const Steps k = {r != 0, to_x.norm, d->pre, d->gated, d->post};
    for (int64_t line = from; line < to; line++) {
        const int64_t at = line * width;
        const float *shortcut = r ? r + at : r;
        if (d->nhwc)
            passed_position(y + at, shortcut, out + at, width, to_x.a, to_x.b, g, k);
        else
            passed_row(y + at, shortcut, out + at, width, to_x.norm ? to_x.a[line] : 1, to_x.norm ? to_x.b[line] : 0,
                       d->gated ? g[line] : 1, k);
    }
}

/* ------------------------------------------------------------------------------------------------------- forward -- */

typedef struct {
    const float *y, *r;
    float *out, *kept;  /* kept: per image s (C), u (K), v (C) for the backward pass; or null */
    const float *gates; /* (N, C): the gates, computed elsewhere from `means`; or null */
    float *means;       /* (N, C): the squeeze is all that is computed, and goes here; or null */
} Maps;

/* Allocate per thread: partial sums (C), h (K), g (C), and s, u, v where they are not kept. */
static float *scratch(const Shape *d) { return malloc((4 * d->channels + 2 * d->hidden + 1) * sizeof(float)); }

static void image_forward(const Shape *d, const Layers *l, Affine to_x, const Maps *m, int64_t n, float *room, int shares) {
    const int64_t C = d->channels, K = d->hidden, size = C * d->positions, lines = d->nhwc ? d->positions : C;
    const float *y = m->y + n * size, *r = m->r ? m->r + n * size : 0;
    float *h = room + C, *own = h + K, *s = m->means ? m->means + n * C : m->kept ? m->kept + n * (2 * C + K) : own + C;
    const float *g = m->gates ? m->gates + n * C : own;
    if (d->gated && !m->gates) {
#pragma omp parallel for num_threads(shares) if (shares > 1) schedule(static)
        for (int64_t t = 0; t < shares; t++) squeeze(d, l, to_x, y, s, room, C * t / shares, C * (t + 1) / shares);
        if (m->means) return;
        excite(d, l, s, s + C, h, s + C + K, own);
    }
    float *out = m->out + n * size;
#pragma omp parallel for num_threads(shares) if (shares > 1) schedule(static)
    for (int64_t t = 0; t < shares; t++) join(d, y, r, to_x, g, out, lines * t / shares, lines * (t + 1) / shares);
}

/* Split the images among the threads or, with fewer images than threads, split each image. */
static int forward(const Shape *d, const Layers *l, const Maps *m) {
    const int among_images = d->images >= d->threads;
    float *a = malloc((2 * d->channels + 1) * sizeof(float)), *b = a + d->channels;
    int failed = !a;
    if (a) affine(d, l, a, b);
#pragma omp parallel num_threads(d->threads) if (d->threads > 1 && among_images)
    {
        float *room = a ? scratch(d) : 0;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < d->images; n++) {
            if (room)
                image_forward(d, l, (Affine){a, b, l->mean != 0}, m, n, room, among_images ? 1 : d->threads);
            else
                failed = 1;
        }
        free(room);
    }
    free(a);
    return failed;
}
