/* A whole Squeeze-and-Excitation block on the CPU, in single precision, in as few passes over the maps as it takes.
 *
 * Python hands over addresses of dense tensors (selab/kernels/cpu.py checks them) and no tensor is known here, so that
 * neither torch's headers nor its compiler settings are needed to build this. An address of 0 is a tensor that there is
 * not. A map is N images of C channels of P positions; `nhwc` says that the channels of a position are neighbours.
 *
 *   x = a y + b;  m = before(x);  s = mean(m);  u = w1 s + b1;  v = w2 act(u) + b2;  g = scale gate(v) + offset
 *   out = behind(g m + r)
 *
 * where a and b are those of a BatchNorm in inference, or 1 and 0; `before` and `behind` are activations
 * or nothing. If the map is not `gated`, g is 1, and what remains is the pass of a BatchNorm, a join and an activation.
 * The backward pass knows no BatchNorm, and no activation but ReLU.
 *
 * Images are gone through one by one, so that a map is still in the cache when it is read for the second time.
 *
 * Source: Hu et al., arXiv 1709.01507, eq. 2-4; that scale and addition are one pass ("Axpy") is the authors' release.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The compiler makes each loop for several generations of processors, and the loader chooses. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define INLINE static inline __attribute__((always_inline))

#define LANES 64  /* independent sums, enough to hide the latency of an addition */
#define FLUSH 256 /* positions after which partial sums are put away, so that rounding does not grow with the map */

enum { NOTHING, RELU, HARDSWISH, SILU }; /* before and behind */
enum { ACT_RELU, ACT_SILU };
enum { GATE_SIGMOID, GATE_HARDSIGMOID };

typedef struct {
    int64_t images, channels, positions, hidden;
    int nhwc, gated, before, behind, activation, gate, threads;
    float scale, offset, eps;
} Shape;

typedef struct {
    const float *w1, *b1, *w2, *b2;
    const float *weight, *bias, *mean, *var; /* of the BatchNorm; without one, mean is 0 */
} Layers;

/* A NaN stays one, as in torch's functions. */
static inline float positive(float x) { return x < 0 ? 0 : x; }

static inline float hardswish(float x) {
    float t = x + 3;
    return x * (t < 0 ? 0 : t > 6 ? 6 : t) * (1.0f / 6);
}

/* e^x to two units in the last place; beyond what a float holds, the nearest it can hold. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693145751953125f - n * 1.42860677e-6f; /* ln 2 in two parts, the first exact times n */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* `kind` is to be known to the compiler wherever speed matters. */
INLINE float activated(float x, int kind) {
    return kind == RELU ? positive(x) : kind == HARDSWISH ? hardswish(x) : kind == SILU ? x * sigmoid(x) : x;
}

/* A channel's values before its mean and its gate. */
typedef struct {
    const float *a, *b;
} Affine;

CLONES static void affine(const Shape *d, const Layers *l, float *a, float *b) {
    for (int64_t c = 0; c < d->channels; c++) {
        a[c] = l->mean ? (l->weight ? l->weight[c] : 1) / sqrtf(l->var[c] + d->eps) : 1;
        b[c] = l->mean ? (l->bias ? l->bias[c] : 0) - l->mean[c] * a[c] : 0;
    }
}

/* ------------------------------------------------------------------------------------------------------- squeeze -- */

/* `sum` of n values at x, in `width` independent sums first. */
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

/* Of x itself or, with an activation, of activation(a x + b). Long rows need many independent sums to hide the latency of
 * an addition, short ones few to be added up. */
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

/* Adds `rows` positions, `stride` apart, to `sums` over n channels: x itself or, with an activation, that of a x + b. */
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

/* Asks for the part of the weights that belongs to these channels: they come from memory while the map is read. */
INLINE void prefetch(const float *weights, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(weights + i, 0, 2);
}

/* The means of channels [from, to) of one image; `partial` has room for all channels. */
CLONES static void squeeze(const Shape *d, const Layers *l, Affine to_x, const float *y, float *s, float *partial,
                           int64_t from, int64_t to) {
    const int64_t C = d->channels, P = d->positions, K = d->hidden;
    if (!d->nhwc)
        for (int64_t c = from; c < to; c++) {
            prefetch(l->w1 + c * K, K);
            prefetch(l->w2 + c * K, K);
            s[c] = row_sum(y + c * P, P, to_x.a[c], to_x.b[c], d->before) / P;
        }
    else {
        for (int64_t c = from; c < to; c++) s[c] = 0;
        for (int64_t p = 0; p < P; p += FLUSH) {
            const int64_t rows = P - p < FLUSH ? P - p : FLUSH;
            memset(partial + from, 0, (to - from) * sizeof(float));
            add_rows(y + p * C + from, partial + from, rows, C, to - from, to_x.a + from, to_x.b + from, d->before);
            for (int64_t c = from; c < to; c++) s[c] += partial[c];
        }
        for (int64_t c = from; c < to; c++) s[c] /= P;
    }
    /* The mean of a x + b is that of x, times a plus b. */
    if (!d->before)
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

/* Calls PASS(shortcut, before, behind) with numbers that the compiler knows, for what networks are made of. */
#define FOR_ALL_PASSES(PASS)                                             \
    if (r && !before && behind == RELU) {                                \
        PASS(r[i], NOTHING, RELU)                                        \
    } else if (!r && !before && !behind) {                               \
        PASS(0, NOTHING, NOTHING)                                        \
    } else if (!r && !before && behind == RELU) {                        \
        PASS(0, NOTHING, RELU)                                           \
    } else if (!r && !before && behind == HARDSWISH) {                   \
        PASS(0, NOTHING, HARDSWISH)                                      \
    } else if (!r && !before && behind == SILU) {                        \
        PASS(0, NOTHING, SILU)                                           \
    } else if (!r && before == RELU && !behind) {                        \
        PASS(0, RELU, NOTHING)                                           \
    } else if (!r && before == HARDSWISH && !behind) {                   \
        PASS(0, HARDSWISH, NOTHING)                                      \
    } else {                                                             \
        PASS((r ? r[i] : 0), before, behind)                             \
    }

/* behind(f y + c + r), or behind(before(f y + c) g + r); for one channel's n values. `out` may be `y` or `r`. */
INLINE void scaled_row(const float *y, const float *r, float *out, int64_t n, float f, float c, float g, int before,
                       int behind) {
#define ROW_PASS(shortcut, first, last)                                                      \
    for (int64_t i = 0; i < n; i++) {                                                        \
        float m = (first) ? activated(y[i] * f + c, first) * g : y[i] * f + c;               \
        out[i] = activated(m + (shortcut), last);                                            \
    }
    FOR_ALL_PASSES(ROW_PASS)
}

/* The same for the n channels of one position. */
INLINE void scaled_position(const float *y, const float *r, float *out, int64_t n, const float *f, const float *c,
                            const float *g, int before, int behind) {
#define POSITION_PASS(shortcut, first, last)                                                       \
    for (int64_t i = 0; i < n; i++) {                                                              \
        float m = (first) ? activated(y[i] * f[i] + c[i], first) * g[i] : y[i] * f[i] + c[i];      \
        out[i] = activated(m + (shortcut), last);                                                  \
    }
    FOR_ALL_PASSES(POSITION_PASS)
}

/* What a map is multiplied by and what is added, per channel: f and c before the activation, g after it. */
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
            scaled_position(y + at, shortcut, out + at, width, k.f, k.c, k.g, d->before, d->behind);
        else
            scaled_row(y + at, shortcut, out + at, width, k.f[line], k.c[line], k.g[line], d->before, d->behind);
    }
}

/* Without an activation between them the gate and the affine map are one; `f` and `c` have room for C. */
CLONES static Factors factors(const Shape *d, Affine to_x, const float *g, float *f, float *c) {
    if (d->before) return (Factors){to_x.a, to_x.b, g};
    for (int64_t i = 0; i < d->channels; i++) f[i] = to_x.a[i] * g[i], c[i] = to_x.b[i] * g[i];
    return (Factors){f, c, g};
}

/* ------------------------------------------------------------------------------------------------------- forward -- */

typedef struct {
    const float *y, *r;
    float *out, *kept; /* kept: for each image s (C), u (K), v (C); 0 where nobody needs them */
} Maps;

/* Of each thread: partial sums, which are f later (C), c (C), h (K), g (C), and s, u, v where they are not kept. */
static float *scratch(const Shape *d) { return malloc((5 * d->channels + 2 * d->hidden) * sizeof(float)); }

static void image_forward(const Shape *d, const Layers *l, Affine to_x, const Maps *m, int64_t n, float *room, int shares) {
    const int64_t C = d->channels, K = d->hidden, size = C * d->positions, lines = d->nhwc ? d->positions : C;
    const float *y = m->y + n * size, *r = m->r ? m->r + n * size : 0;
    float *f = room, *c = f + C, *h = c + C, *g = h + K, *s = m->kept ? m->kept + n * (2 * C + K) : g + C;
    float *out = m->out + n * size;
    Factors k = {to_x.a, to_x.b, to_x.a}; /* g is not looked at without an activation */
    if (d->gated) {
#pragma omp parallel for num_threads(shares) if (shares > 1) schedule(static)
        for (int64_t t = 0; t < shares; t++) squeeze(d, l, to_x, y, s, room, C * t / shares, C * (t + 1) / shares);
        excite(d, l, s, s + C, h, s + C + K, g);
        k = factors(d, to_x, g, f, c);
    }
#pragma omp parallel for num_threads(shares) if (shares > 1) schedule(static)
    for (int64_t t = 0; t < shares; t++) join(d, y, r, k, out, lines * t / shares, lines * (t + 1) / shares);
}

/* Threads share out the images or, where there are fewer of them, each image. */
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

/* ------------------------------------------------------------------------------------------------------ backward -- */

/* dz = out <= 0 ? 0 : dout over n values, and the sum of dz * m; without `out` dz is dout and is not written. */
INLINE float reduced_row(const float *restrict dout, const float *restrict out, const float *restrict y,
                         float *restrict dz, int64_t n, int relu_in) {
    float sums[LANES] = {0}, sum = 0;
    int64_t i = 0;
    if (out && !relu_in)
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float z = out[i + j] <= 0 ? 0 : dout[i + j];
                dz[i + j] = z;
                sums[j] += z * y[i + j];
            }
    else if (!out && relu_in)
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) sums[j] += dout[i + j] * positive(y[i + j]);
    else if (!out)
        for (; i + LANES <= n; i += LANES)
            for (int j = 0; j < LANES; j++) sums[j] += dout[i + j] * y[i + j];
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < LANES; j++) sum += sums[j];
    for (; i < n; i++) {
        float z = out && out[i] <= 0 ? 0 : dout[i];
        if (out) dz[i] = z;
        sum += z * (relu_in ? positive(y[i]) : y[i]);
    }
    return sum;
}

/* The same for one position: each of n channels has its own sum. */
INLINE void reduced_position(const float *restrict dout, const float *restrict out, const float *restrict y,
                                    float *restrict dz, float *restrict sums, int64_t n, int relu_in) {
    if (out && !relu_in)
        for (int64_t i = 0; i < n; i++) {
            float z = out[i] <= 0 ? 0 : dout[i];
            dz[i] = z;
            sums[i] += z * y[i];
        }
    else if (out)
        for (int64_t i = 0; i < n; i++) {
            float z = out[i] <= 0 ? 0 : dout[i];
            dz[i] = z;
            sums[i] += z * positive(y[i]);
        }
    else
        for (int64_t i = 0; i < n; i++) sums[i] += dout[i] * (relu_in ? positive(y[i]) : y[i]);
}

INLINE void spread_row(const float *dz, const float *y, float *dy, int64_t n, float g, float ds, int relu_in) {
    if (relu_in)
        for (int64_t i = 0; i < n; i++) dy[i] = y[i] <= 0 ? 0 : dz[i] * g + ds;
    else
        for (int64_t i = 0; i < n; i++) dy[i] = dz[i] * g + ds;
}

INLINE void spread_position(const float *dz, const float *y, float *dy, int64_t n, const float *g,
                                   const float *ds, int relu_in) {
    if (relu_in)
        for (int64_t i = 0; i < n; i++) dy[i] = y[i] <= 0 ? 0 : dz[i] * g[i] + ds[i];
    else
        for (int64_t i = 0; i < n; i++) dy[i] = dz[i] * g[i] + ds[i];
}

/* dv = dg * scale * gate'(v) */
INLINE void gate_gradients(const float *restrict v, float *restrict dg, int64_t n, int kind, float scale) {
    if (kind == GATE_SIGMOID)
        for (int64_t i = 0; i < n; i++) {
            float s = sigmoid(v[i]);
            dg[i] *= scale * s * (1 - s);
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
    float *dz, *dy, *dv, *du; /* dz: 0 where there is no ReLU behind; dv, du: (N, C), (N, K) */
} Gradients;

/* One image: `ds` has room for C and as many factors. */
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
                reduced_position(dout + at, out ? out + at : out, y + at, dz ? dz + at : dz, ds, C, d->before);
            }
            for (int64_t c = 0; c < C; c++) dv[c] += ds[c];
        }
    } else
        for (int64_t c = 0; c < C; c++) {
            const int64_t at = c * P;
            dv[c] = reduced_row(dout + at, out ? out + at : out, y + at, dz ? dz + at : dz, P, d->before);
        }
    gate_gradients(v, dv, C, d->gate, d->scale);
    memset(du, 0, K * sizeof(float));
    for (int64_t c = 0; c < C; c++) add_scaled(l->w2 + c * K, du, K, dv[c]);
    activation_gradients(u, du, K, d->activation);
    memset(ds, 0, C * sizeof(float));
    for (int64_t k = 0; k < K; k++) add_scaled(l->w1 + k * C, ds, C, du[k] / P);
    gates(v, g, C, d->gate, d->scale, d->offset);
    const float *from = dz ? dz : dout;
    if (d->nhwc)
        for (int64_t at = 0; at < size; at += C) spread_position(from + at, y + at, dy + at, C, g, ds, d->before);
    else
        for (int64_t c = 0, at = 0; c < C; c++, at += P) spread_row(from + at, y + at, dy + at, P, g[c], ds[c], d->before);
}

static int backward(const Shape *d, const Layers *l, const Gradients *m) {
    int failed = 0;
#pragma omp parallel num_threads(d->threads) if (d->threads > 1)
    {
        float *ds = malloc(2 * d->channels * sizeof(float));
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

/* -------------------------------------------------------------------------------------------------------- Python -- */

typedef unsigned long long Address;
#define AT(address) ((float *)(uintptr_t)(address))
static PyObject *done(int failed) {
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* The numbers of a map and its block as bytes, so that they are taken apart once and not in every call. */
static PyObject *py_shape(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    memset(&d, 0, sizeof d);
    long long images, channels, positions, hidden;
    if (!PyArg_ParseTuple(args, "LLLLiiiiiiifff", &images, &channels, &positions, &hidden, &d.nhwc, &d.gated, &d.before,
                          &d.behind, &d.activation, &d.gate, &d.threads, &d.scale, &d.offset, &d.eps))
        return NULL;
    d.images = images, d.channels = channels, d.positions = positions, d.hidden = hidden;
    return PyBytes_FromStringAndSize((const char *)&d, sizeof d);
}

static int read_shape(const char *raw, Py_ssize_t size, Shape *d) {
    if (size != (Py_ssize_t)sizeof *d) {
        PyErr_SetString(PyExc_ValueError, "the first argument must come from shape()");
        return 0;
    }
    memcpy(d, raw, sizeof *d);
    return 1;
}

static PyObject *py_gated(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    const char *raw;
    Py_ssize_t size;
    Address w1, b1, w2, b2, weight, bias, mean, var, y, r, out, kept;
    if (!PyArg_ParseTuple(args, "y#KKKKKKKKKKKK", &raw, &size, &w1, &b1, &w2, &b2, &weight, &bias, &mean, &var, &y, &r,
                          &out, &kept))
        return NULL;
    if (!read_shape(raw, size, &d)) return NULL;
    Layers l = {AT(w1), AT(b1), AT(w2), AT(b2), AT(weight), AT(bias), AT(mean), AT(var)};
    Maps m = {AT(y), AT(r), AT(out), AT(kept)};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = forward(&d, &l, &m);
    Py_END_ALLOW_THREADS
    return done(failed);
}

static PyObject *py_gated_backward(PyObject *self, PyObject *args) {
    (void)self;
    Shape d;
    const char *raw;
    Py_ssize_t size;
    Address w1, w2, dout, out, y, kept, dz, dy, dv, du;
    if (!PyArg_ParseTuple(args, "y#KKKKKKKKKK", &raw, &size, &w1, &w2, &dout, &out, &y, &kept, &dz, &dy, &dv, &du))
        return NULL;
    if (!read_shape(raw, size, &d)) return NULL;
    Layers l = {.w1 = AT(w1), .w2 = AT(w2)};
    Gradients m = {AT(dout), AT(out), AT(y), AT(kept), AT(dz), AT(dy), AT(dv), AT(du)};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = backward(&d, &l, &m);
    Py_END_ALLOW_THREADS
    return done(failed);
}

/* ------------------------------------------------------------------------------------------------------ decisions -- */

/* `forward` once more for maps that are like the one it was decided for. Called with a map and a shortcut or None, it
 * returns the output, or None as soon as anything is not as it was; selab/kernels/choice.py says what that is. A map may
 * wait for a BatchNorm, which its attribute `_waits_for` names, and is of the class `kind` meanwhile (selab/waiting.py); a
 * decision without a shape is that of the BatchNorm itself, which marks the map and hands it on. In C because between two
 * convolutions the caches have forgotten the interpreter, which makes such a decision in Python cost as much as a row of
 * the map. */
enum {
    BYTES, FLAGS, HOOKS, CHILDREN, FACTS, WEIGHTS, NORM, KIND, TENSOR, DTYPE, SIZE, STRIDE, LEVELS, COUNT, THREADS, EMPTY_LIKE,
    HELD
};

#define LAYERS 8 /* tensors of a `Layers` */

typedef struct {
    PyObject_HEAD
    PyObject *held[HELD];
    int joined, owns_input;
} Decision;

static PyObject *S_shape, *S_stride, *S_dtype, *S_is_cpu, *S_data_ptr, *S_numel, *S_level, *S_dict, *S_class, *S_waits_for;

static int decision_init(PyObject *object, PyObject *args, PyObject *kwargs) {
    Decision *self = (Decision *)object;
    PyObject **held = self->held;
    static char *names[] = {"shape_bytes", "flags",  "hooks",  "children", "facts",      "weights",    "norm",
                            "kind",        "tensor", "dtype",  "size",     "stride",     "levels",     "count",
                            "threads",     "empty_like", "joined", "owns_input", NULL};
    if (held[BYTES]) {
        PyErr_SetString(PyExc_TypeError, "a decision is made once");
        return -1;
    }
    PyObject *given[HELD];
    PyTypeObject *tuple = &PyTuple_Type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "SO!O!O!O!O!OOOOOOO!OOO|pp", names, given + BYTES, tuple, given + FLAGS,
                                     tuple, given + HOOKS, tuple, given + CHILDREN, tuple, given + FACTS, tuple,
                                     given + WEIGHTS, given + NORM, given + KIND, given + TENSOR, given + DTYPE,
                                     given + SIZE, given + STRIDE, &PyDict_Type, given + LEVELS, given + COUNT,
                                     given + THREADS, given + EMPTY_LIKE, &self->joined, &self->owns_input))
        return -1;
    if (PyTuple_Size(given[WEIGHTS]) > LAYERS) {
        PyErr_SetString(PyExc_ValueError, "there are more weights than a block has");
        return -1;
    }
    for (int i = 0; i < HELD; i++) held[i] = Py_NewRef(given[i]);
    return 0;
}

static int decision_traverse(PyObject *object, visitproc visit, void *arg) {
    Decision *self = (Decision *)object;
    Py_VISIT(Py_TYPE(object));
    for (int i = 0; i < HELD; i++) Py_VISIT(self->held[i]);
    return 0;
}

static int decision_clear(PyObject *object) {
    Decision *self = (Decision *)object;
    for (int i = 0; i < HELD; i++) Py_CLEAR(self->held[i]);
    return 0;
}

static void decision_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    decision_clear(object);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

/* 1 if an attribute (or what a method without arguments returns) is this very object or equal to it, 0 if not, -1. */
static int is_so(PyObject *object, PyObject *name, int method, PyObject *expected) {
    PyObject *found =
        method ? PyObject_CallMethodObjArgs(object, name, NULL) : PyObject_GetAttr(object, name);
    if (!found) return -1;
    int same = found == expected ? 1 : PyObject_RichCompareBool(found, expected, Py_EQ);
    Py_DECREF(found);
    return same;
}

static int is_like(const Decision *d, PyObject *map) {
    if ((PyObject *)Py_TYPE(map) != d->held[TENSOR]) return 0;
    int same = is_so(map, S_shape, 0, d->held[SIZE]);
    if (same > 0) same = is_so(map, S_stride, 1, d->held[STRIDE]);
    if (same > 0) same = is_so(map, S_dtype, 0, d->held[DTYPE]);
    return same > 0 ? is_so(map, S_is_cpu, 0, Py_True) : same;
}

/* No flag of torch's is up, no hook waits, the children and the number of threads are the same. */
static int is_quiet(const Decision *d) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[HOOKS]); i++)
        if (PyDict_Size(PyTuple_GetItem(d->held[HOOKS], i))) return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[FLAGS]); i++) {
        PyObject *up = PyObject_CallNoArgs(PyTuple_GetItem(d->held[FLAGS], i));
        if (!up) return -1;
        int is_up = PyObject_IsTrue(up);
        Py_DECREF(up);
        if (is_up) return is_up < 0 ? -1 : 0;
    }
    PyObject *level = PyDict_GetItemWithError(d->held[LEVELS], S_level);
    if (!level) return PyErr_Occurred() ? -1 : 0;
    if (PyLong_AsLong(level) >= 0) return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[CHILDREN]); i++) {
        PyObject *pair = PyTuple_GetItem(d->held[CHILDREN], i);
        PyObject *now = PyTuple_GetItem(pair, 0), *before = PyTuple_GetItem(pair, 1), *value;
        if (PyDict_Size(now) != PyTuple_Size(before)) return 0;
        Py_ssize_t at = 0, index = 0;
        while (PyDict_Next(now, &at, NULL, &value))
            if (value != PyTuple_GetItem(before, index++)) return 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[FACTS]); i++) {
        PyObject *fact = PyTuple_GetItem(d->held[FACTS], i);
        PyObject *now = PyDict_GetItemWithError(PyTuple_GetItem(fact, 0), PyTuple_GetItem(fact, 1));
        if (now != PyTuple_GetItem(fact, 2)) return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *threads = PyObject_CallNoArgs(d->held[COUNT]);
    if (!threads) return -1;
    int same = PyObject_RichCompareBool(threads, d->held[THREADS], Py_EQ);
    Py_DECREF(threads);
    return same;
}

static int address(PyObject *tensor, Address *into) {
    PyObject *found = PyObject_CallMethodObjArgs(tensor, S_data_ptr, NULL);
    if (!found) return -1;
    *into = PyLong_AsUnsignedLongLong(found);
    Py_DECREF(found);
    return PyErr_Occurred() ? -1 : 1;
}

/* The tensors of `Layers`: (a module's parameters or buffers, name, the tensor or None, its elements), or None, each. */
static int read_weights(const Decision *d, Address *into) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(d->held[WEIGHTS]); i++) {
        PyObject *one = PyTuple_GetItem(d->held[WEIGHTS], i);
        if (one == Py_None) continue;
        PyObject *now = PyDict_GetItemWithError(PyTuple_GetItem(one, 0), PyTuple_GetItem(one, 1));
        PyObject *before = PyTuple_GetItem(one, 2);
        if (now != before) return PyErr_Occurred() ? -1 : 0;
        if (before == Py_None) continue;
        int same = is_so(before, S_dtype, 0, d->held[DTYPE]);
        if (same > 0) same = is_so(before, S_numel, 1, PyTuple_GetItem(one, 3));
        if (same > 0) same = address(before, into + i);
        if (same <= 0) return same;
    }
    return 1;
}

/* 1 if the map waits for the BatchNorm that it was decided for (`norm`), or for none if that is None. */
static int waits(PyObject *marks, PyObject *norm) {
    PyObject *found = PyDict_GetItemWithError(marks, S_waits_for);
    if (!found && PyErr_Occurred()) return -1;
    return (found ? found : Py_None) == norm;
}

static PyObject *run(Decision *self, PyObject *y, PyObject *r, PyObject *marks) {
    Address layers[LAYERS] = {0}, maps[3] = {0};
    const int marking = PyBytes_Size(self->held[BYTES]) == 0;
    int same = is_quiet(self);
    if (same > 0) same = waits(marks, marking ? Py_None : self->held[NORM]);
    /* A map that waits is normalised by whoever asks it for anything, so that its own class comes first. From here on it
     * is its reader's business, also where this decision is not taken. */
    if (same > 0 && !marking && self->held[NORM] != Py_None && PyObject_SetAttr(y, S_class, self->held[TENSOR]) < 0)
        return NULL;
    if (same > 0) same = is_like(self, y);
    if (same > 0 && marking) {
        if (PyDict_SetItem(marks, S_waits_for, self->held[NORM]) < 0) return NULL;
        return PyObject_SetAttr(y, S_class, self->held[KIND]) < 0 ? NULL : Py_NewRef(y);
    }
    if (same > 0 && self->joined) same = is_like(self, r);
    if (same > 0) same = read_weights(self, layers);
    if (same > 0) same = address(y, maps);
    if (same > 0 && self->joined) same = address(r, maps + 1);
    if (same < 0) return NULL;
    if (!same) Py_RETURN_NONE;
    PyObject *out = self->owns_input ? Py_NewRef(y) : PyObject_CallFunctionObjArgs(self->held[EMPTY_LIKE], y, NULL);
    if (!out) return NULL;
    char *raw;
    Py_ssize_t size;
    Shape d;
    if (address(out, maps + 2) < 0 || PyBytes_AsStringAndSize(self->held[BYTES], &raw, &size) < 0 ||
        !read_shape(raw, size, &d) || (self->held[NORM] != Py_None && PyDict_DelItem(marks, S_waits_for) < 0)) {
        Py_DECREF(out);
        return NULL;
    }
    Layers l = {AT(layers[0]), AT(layers[1]), AT(layers[2]), AT(layers[3]),
                AT(layers[4]), AT(layers[5]), AT(layers[6]), AT(layers[7])};
    Maps m = {AT(maps[0]), AT(maps[1]), AT(maps[2]), NULL};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = forward(&d, &l, &m);
    Py_END_ALLOW_THREADS
    if (failed) {
        Py_DECREF(out);
        return PyErr_NoMemory();
    }
    return out;
}

static PyObject *decision_call(PyObject *object, PyObject *args, PyObject *kwargs) {
    Decision *self = (Decision *)object;
    PyObject *y, *r;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "OO", &y, &r)) return NULL;
    if (!self->held[BYTES] || (r != Py_None) != self->joined) Py_RETURN_NONE;
    PyObject *marks = PyObject_GetAttr(y, S_dict);
    if (!marks) return NULL;
    PyObject *out = run(self, y, r, marks);
    Py_DECREF(marks);
    return out;
}

static PyType_Slot decision_slots[] = {
    {Py_tp_init, (void *)decision_init},
    {Py_tp_dealloc, (void *)decision_dealloc},
    {Py_tp_traverse, (void *)decision_traverse},
    {Py_tp_clear, (void *)decision_clear},
    {Py_tp_call, (void *)decision_call},
    {Py_tp_doc, "The forward pass once more, for maps that are like the one it was decided for."},
    {0, NULL},
};
static PyType_Spec decision_spec = {"selab.kernels._native.Decision", sizeof(Decision), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, decision_slots};

static PyMethodDef methods[] = {
    {"shape", py_shape, METH_VARARGS, "The numbers of a map and its block, for the others."},
    {"gated", py_gated, METH_VARARGS, "The forward pass: shape, layers, maps."},
    {"gated_backward", py_gated_backward, METH_VARARGS, "The gradients of maps and logits: shape, layers, maps."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Squeeze-and-Excitation on the CPU, on addresses.", -1, methods, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__native(void) {
    PyObject **names[] = {&S_shape, &S_stride, &S_dtype, &S_is_cpu, &S_data_ptr, &S_numel, &S_level,
                          &S_dict,  &S_class,  &S_waits_for};
    static const char *words[] = {"shape",    "stride",    "dtype",     "is_cpu", "data_ptr", "numel", "_current_level",
                                  "__dict__", "__class__", "_waits_for"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!(*names[i] = PyUnicode_InternFromString(words[i]))) return NULL;
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module ? PyType_FromSpec(&decision_spec) : NULL;
    if (!type || PyModule_AddObjectRef(module, "Decision", type) < 0) {
        Py_XDECREF(type);
        Py_XDECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}
