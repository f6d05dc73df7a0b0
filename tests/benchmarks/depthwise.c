/* A depthwise convolution with its BatchNorm and activation in one pass that may also take the sums of the squeeze: what
 * bench_depthwise.py measures. One image, one thread, NCHW, single precision; the block behind it as in selab/kernels.
 */
#include "native_forward.h"

/* Sizes of a layer and of the block behind it; `taps` is 3 or 5, `stride` 1 or 2. */
typedef struct {
    int64_t channels, height, width, out_height, out_width, hidden;
    int taps, stride, after, activation, gate;
} Sizes;

/* What happens behind the convolution. */
enum { CONVOLUTION_ALONE, SQUEEZE_APART, SQUEEZE_WITHIN, GATES_ALONE };

/* Spread a channel over `stride` x `stride` planes of padded rows, so that every tap reads adjacent values. */
INLINE void spread(const Sizes *z, const float *restrict x, float *restrict planes, int64_t lines, int64_t pitch, int S) {
    const int64_t pad = z->taps / 2, size = lines * pitch;
    memset(planes, 0, S * S * size * sizeof(float));
    for (int64_t i = 0; i < z->height; i++, x += z->width) {
        float *row = planes + (i + pad) % S * S * size + (i + pad) / S * pitch;
        if (S == 1)
            memcpy(row + pad, x, z->width * sizeof(float));
        else
            for (int first = 0; first < 2; first++) {
                float *restrict to = row + (first + pad) % 2 * size + (first + pad) / 2;
                for (int64_t j = 0; 2 * j + first < z->width; j++) to[j] = x[2 * j + first];
            }
    }
}

/* The convolution and activation of n positions in rows of `pitch`. */
INLINE void taps(const float *restrict planes, const float *restrict w, float b, float *restrict to, int64_t n,
                 int64_t size, int64_t pitch, int K, int S, int after) {
#define AT(row, column) planes[((row) % S * S + (column) % S) * size + (row) / S * pitch + (column) / S + i] * w[(row) * K + (column)]
#define THREE(row) (AT(row, 0) + AT(row, 1) + AT(row, 2))
#define FIVE(row) (THREE(row) + AT(row, 3) + AT(row, 4))
    if (K == 3)
        for (int64_t i = 0; i < n; i++) to[i] = activated(b + THREE(0) + THREE(1) + THREE(2), after);
    else
        for (int64_t i = 0; i < n; i++)
            to[i] = activated(b + FIVE(0) + FIVE(1) + FIVE(2) + FIVE(3) + FIVE(4), after);
#undef AT
}

INLINE void channel(const Sizes *z, const float *x, const float *w, float b, float *y, float *room, int K, int S, int after) {
    const int64_t lines = z->out_height + (K - 1) / S + 1, pitch = z->out_width + (K - 1) / S, size = lines * pitch;
    float *wide = room + S * S * size;
    spread(z, x, room, lines, pitch, S);
    taps(room, w, b, wide, z->out_height * pitch, size, pitch, K, S, after);
    for (int64_t i = 0; i < z->out_height; i++)
        memcpy(y + i * z->out_width, wide + i * pitch, z->out_width * sizeof(float));
}

/* Floats that `run` needs beside its maps. */
int64_t room_of(const Sizes *z) {
    const int64_t lines = z->out_height + 5, pitch = z->out_width + 5;
    return 5 * lines * pitch + 64 + 4 * z->channels + 2 * z->hidden;
}

#define BY_ACTIVATION(K, S)                                                              \
    if (z->after == RELU)                                                                \
        channel(z, from, kernel, b[c], to, room, K, S, RELU);                            \
    else if (z->after == HARDSWISH)                                                      \
        channel(z, from, kernel, b[c], to, room, K, S, HARDSWISH);                       \
    else                                                                                 \
        channel(z, from, kernel, b[c], to, room, K, S, SILU);

/* x to y; `w` and `b` are the convolution's, with its BatchNorm folded in; `g` receives the gates. */
CLONES void run(const Sizes *z, int what, const float *x, const float *w, const float *b, const float *w1, const float *b1,
                const float *w2, const float *b2, float *y, float *g, float *room) {
    const int64_t C = z->channels, K = z->hidden, P = z->out_height * z->out_width;
    float *s = room + room_of(z) - 4 * C - 2 * K, *u = s + C, *v = u + K, *h = v + C, *partial = h + K;
    for (int64_t c = 0; c < C; c++) {
        const float *from = x + c * z->height * z->width, *kernel = w + c * z->taps * z->taps;
        float *to = y + c * P;
        if (z->taps == 3 && z->stride == 1) {
            BY_ACTIVATION(3, 1)
        } else if (z->taps == 3) {
            BY_ACTIVATION(3, 2)
        } else if (z->stride == 1) {
            BY_ACTIVATION(5, 1)
        } else {
            BY_ACTIVATION(5, 2)
        }
        if (what >= SQUEEZE_WITHIN) s[c] = row_sum(to, P, 0, 1, 0, NOTHING) / P;
    }
    if (what == CONVOLUTION_ALONE) return;
    const Shape d = {.images = 1, .channels = C, .positions = P, .hidden = K, .gated = 1, .activation = z->activation,
                     .gate = z->gate, .threads = 1, .scale = 1};
    const Layers l = {.w1 = w1, .b1 = b1, .w2 = w2, .b2 = b2};
    const Affine none = {s, s, 0};
    if (what == SQUEEZE_APART) squeeze(&d, &l, none, y, s, partial, 0, C);
    excite(&d, &l, s, u, h, v, g);
    if (what != GATES_ALONE) join(&d, y, 0, none, g, y, 0, C);
}
