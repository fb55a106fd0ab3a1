/* One pass over the pixels of an image: the features of `animesion.images.features`, and its RGB bytes for a digest.
 *
 * Nothing here decides anything. Sums are of whole numbers, so they are the same on every machine and in whatever order
 * they are taken; resampling is Pillow's fixed-point arithmetic, with weights that come from Python. Every result has a
 * slower equal in Python, which is used where this file was not compiled: tests hold the two against each other.
 *
 * Pixels are 32-bit words, red in the lowest byte, as Pillow keeps them; the highest byte is never looked at.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for machines whose lowest byte comes first"
#endif

/* Compiled twice where the compiler can, the faster one chosen when the module is loaded. */
#ifdef ANIMESION_CLONES
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif
#define INLINE static inline __attribute__((always_inline))

enum {
    SIDE = 32,      /* of the reduced grey image */
    LOW = 8,        /* of the block of low frequencies */
    THUMB = 16,     /* side of the thumbnail */
    LANES = 8,      /* results that one pixel may count for */
    ROWS = 4,       /* resampled together */
    SMALL = 1024,   /* sides of the reduced copy are below */
    TINY = 128,     /* and of the copy for chroma */
    MOST = 16384,   /* sides above are left to Python */
    BITS = 22,      /* weights are multiples of 2^-22 */
    HALF = 1 << (BITS - 1),
    REDUCED = 128,  /* largest whole number to reduce by */
    PACKED = 257,   /* sums of as many levels fit 16 bits */
    STEP = 16       /* pixels at once, in rows that have room behind them */
};

typedef uint8_t sixteen __attribute__((vector_size(16)));
typedef int16_t halves __attribute__((vector_size(32)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

INLINE uint8_t clipped(int32_t sum) {
    int32_t level = sum >> BITS;
    return level < 0 ? 0 : level > 255 ? 255 : (uint8_t)level;
}

/* Weights of one axis: runs of pixels that count for the same LANES results, and a weight for each of those. */
typedef struct {
    int32_t runs;
    const int32_t *bounds;  /* per run: first result, first pixel, pixel after the last */
    const int32_t *weights; /* per pixel: LANES of them */
} Axis;

/* Equal weights of one axis of the thumbnail: first pixel, number, weight for each of THUMB results. */
typedef int32_t Areas[THUMB][3];

typedef struct {
    int32_t width, height, channels, factor, fine, flat;
    const uint8_t *pixels;
    Axis across, down;
    int has_areas;
    Areas wide, tall;
    /* room */
    int32_t small_width, small_height, tiny_width, tiny_height;
    int32_t *luma;     /* ROWS x width */
    uint32_t *row;     /* width, for pixels of three bytes */
    uint32_t *red_blue, *green; /* sums of a row of blocks */
    uint8_t *squeezed; /* height x SIDE */
    uint32_t *small;   /* small_height x small_width */
    uint8_t *grey;     /* the same, grey */
    /* results */
    uint8_t shrunk[SIDE * SIDE];
    uint8_t thumbnail[THUMB * THUMB * 3];
    int known, known_flip;
    uint64_t phash, phash_flip;
    int32_t light, dark;
    int64_t level_sums[3], edge_sums[3], tint_sums[10];
    int any_flat;
} Look;

/* Three bytes a pixel to words. */
INLINE void widened(const uint8_t *restrict bytes, int32_t count, uint32_t *restrict words) {
    for (int32_t x = 0; x < count; x++)
        words[x] = (uint32_t)bytes[3 * x] | (uint32_t)bytes[3 * x + 1] << 8 | (uint32_t)bytes[3 * x + 2] << 16;
}

/* ITU-R BT.601 as Pillow rounds it. */
INLINE void greyed(const uint32_t *restrict pixels, int32_t count, int32_t *restrict luma) {
    for (int32_t x = 0; x < count; x++) {
        uint32_t p = pixels[x];
        luma[x] = (int32_t)(((p & 255) * 19595 + (p >> 8 & 255) * 38470 + (p >> 16 & 255) * 7471 + 0x8000) >> 16);
    }
}

INLINE void bytes_of(const int32_t *restrict luma, int32_t count, uint8_t *restrict grey) {
    for (int32_t x = 0; x < count; x++) grey[x] = (uint8_t)luma[x];
}

/* ROWS rows of grey levels to SIDE columns each. */
INLINE void squeezed(const int32_t *luma, int32_t width, const Axis *axis, uint8_t *out, int32_t rows) {
    int32_t sums[ROWS][SIDE];
    for (int32_t r = 0; r < ROWS; r++)
        for (int32_t i = 0; i < SIDE; i++) sums[r][i] = HALF;
    for (int32_t run = 0; run < axis->runs; run++) {
        const int32_t first = axis->bounds[3 * run];
        lanes a, b, c, d, weight;
        memcpy(&a, sums[0] + first, sizeof a);
        memcpy(&b, sums[1] + first, sizeof b);
        memcpy(&c, sums[2] + first, sizeof c);
        memcpy(&d, sums[3] + first, sizeof d);
        for (int32_t x = axis->bounds[3 * run + 1]; x < axis->bounds[3 * run + 2]; x++) {
            memcpy(&weight, axis->weights + (size_t)x * LANES, sizeof weight);
            a += weight * luma[x];
            b += weight * luma[x + width];
            c += weight * luma[x + 2 * width];
            d += weight * luma[x + 3 * width];
        }
        memcpy(sums[0] + first, &a, sizeof a);
        memcpy(sums[1] + first, &b, sizeof b);
        memcpy(sums[2] + first, &c, sizeof c);
        memcpy(sums[3] + first, &d, sizeof d);
    }
    for (int32_t r = 0; r < rows; r++)
        for (int32_t i = 0; i < SIDE; i++) out[r * SIDE + i] = clipped(sums[r][i]);
}

/* The columns, once all rows are SIDE long. */
INLINE void stacked(const uint8_t *rows, const Axis *axis, uint8_t *out) {
    int32_t sums[SIDE][SIDE];
    for (int32_t i = 0; i < SIDE; i++)
        for (int32_t j = 0; j < SIDE; j++) sums[i][j] = HALF;
    for (int32_t run = 0; run < axis->runs; run++) {
        const int32_t first = axis->bounds[3 * run];
        for (int32_t y = axis->bounds[3 * run + 1]; y < axis->bounds[3 * run + 2]; y++) {
            int32_t levels[SIDE];
            for (int32_t j = 0; j < SIDE; j++) levels[j] = rows[(size_t)y * SIDE + j];
            for (int32_t i = 0; i < LANES; i++) {
                const int32_t weight = axis->weights[(size_t)y * LANES + i];
                if (weight)
                    for (int32_t j = 0; j < SIDE; j++) sums[first + i][j] += weight * levels[j];
            }
        }
    }
    for (int32_t i = 0; i < SIDE; i++)
        for (int32_t j = 0; j < SIDE; j++) out[i * SIDE + j] = clipped(sums[i][j]);
}

/* Averages of blocks as Pillow's `reduce` rounds them. */
INLINE uint32_t share(uint32_t size) {
    return (uint32_t)(4294967296.0f / (float)(size << 8));
}

INLINE void summed(
    const uint32_t *restrict pixels, int32_t width, uint32_t *restrict red_blue, uint32_t *restrict green, int fresh
) {
    if (fresh) {
        for (int32_t x = 0; x < width; x++) {
            red_blue[x] = pixels[x] & 0xFF00FF;
            green[x] = pixels[x] >> 8 & 0xFF;
        }
    } else {
        for (int32_t x = 0; x < width; x++) {
            red_blue[x] += pixels[x] & 0xFF00FF;
            green[x] += pixels[x] >> 8 & 0xFF;
        }
    }
}

INLINE uint32_t block(
    const uint32_t *red_blue, const uint32_t *green, int32_t wide, uint32_t size, uint32_t half, uint32_t part
) {
    uint32_t red = 0, blue = 0, middle = 0;
    if (size <= PACKED) {
        uint32_t both = 0;
        for (int32_t i = 0; i < wide; i++) both += red_blue[i], middle += green[i];
        red = both & 0xFFFF, blue = both >> 16;
    } else {
        for (int32_t i = 0; i < wide; i++)
            red += red_blue[i] & 0xFFFF, blue += red_blue[i] >> 16, middle += green[i];
    }
    red = (red + half) * part >> 24;
    middle = (middle + half) * part >> 24;
    blue = (blue + half) * part >> 24;
    return red | middle << 8 | blue << 16;
}

/* Blocks of `wide` columns whose rows, `high` of them, are summed up. */
INLINE void averaged(
    const uint32_t *red_blue, const uint32_t *green, int32_t width, int32_t wide, int32_t high, uint32_t *out
) {
    const int32_t whole = width / wide, rest = width - whole * wide;
    const uint32_t size = (uint32_t)(wide * high), half = size / 2, part = share(size);
    if (wide == 2) /* so that the compiler knows it */
        for (int32_t i = 0; i < whole; i++) out[i] = block(red_blue + 2 * i, green + 2 * i, 2, size, half, part);
    else if (wide == 3)
        for (int32_t i = 0; i < whole; i++) out[i] = block(red_blue + 3 * i, green + 3 * i, 3, size, half, part);
    else
        for (int32_t i = 0; i < whole; i++)
            out[i] = block(red_blue + wide * i, green + wide * i, wide, size, half, part);
    if (rest) {
        const uint32_t left = (uint32_t)(rest * high);
        out[whole] = block(red_blue + whole * wide, green + whole * wide, rest, left, left / 2, share(left));
    }
}

/* How many pixels, their sum and the sum of their squares; and the levels of both ends. */
INLINE void levels(Look *look) {
    uint32_t counts[4][256];
    const int64_t n = (int64_t)look->small_width * look->small_height;
    const uint8_t *grey = look->grey;
    int64_t i = 0;
    memset(counts, 0, sizeof counts);
    for (; i + 4 <= n; i += 4) {
        counts[0][grey[i]]++;
        counts[1][grey[i + 1]]++;
        counts[2][grey[i + 2]]++;
        counts[3][grey[i + 3]]++;
    }
    for (; i < n; i++) counts[0][grey[i]]++;
    int64_t below = 0, total = 0, squares = 0;
    const int64_t most = (99 * n + 99) / 100, least = n / 20 + 1;
    look->light = look->dark = -1;
    for (int32_t level = 0; level < 256; level++) {
        const int64_t count = (int64_t)counts[0][level] + counts[1][level] + counts[2][level] + counts[3][level];
        below += count;
        total += count * level;
        squares += count * level * level;
        if (look->light < 0 && below >= most) look->light = level;
        if (look->dark < 0 && below >= least) look->dark = level;
    }
    look->level_sums[0] = n, look->level_sums[1] = total, look->level_sums[2] = squares;
}

/* The Laplacian inside: how many pixels, their sum and the sum of their squares. */
INLINE void edges(Look *look) {
    const int32_t width = look->small_width, height = look->small_height;
    int64_t total = 0, squares = 0;
    const int32_t padded = (width + STEP - 1) / STEP * STEP;
    if (width < 3 || height < 3) {
        memset(look->edge_sums, 0, sizeof look->edge_sums);
        return;
    }
    for (int32_t y = 1; y < height - 1; y++) {
        const uint8_t *at = look->grey + (size_t)y * width;
        int16_t found[SMALL + STEP];
        int32_t row_total = 0, row_squares = 0;
        /* whole steps are quicker: what they reach over the inside is taken away */
        for (int32_t x = 0; x < width; x += STEP) {
            sixteen bytes;
            halves sum, middle;
            memcpy(&bytes, at + x, sizeof bytes);
            middle = __builtin_convertvector(bytes, halves);
            memcpy(&bytes, at + x - width, sizeof bytes);
            sum = __builtin_convertvector(bytes, halves) - 4 * middle;
            memcpy(&bytes, at + x + width, sizeof bytes);
            sum += __builtin_convertvector(bytes, halves);
            memcpy(&bytes, at + x - 1, sizeof bytes);
            sum += __builtin_convertvector(bytes, halves);
            memcpy(&bytes, at + x + 1, sizeof bytes);
            sum += __builtin_convertvector(bytes, halves);
            memcpy(found + x, &sum, sizeof sum);
        }
        found[0] = 0;
        memset(found + width - 1, 0, STEP * sizeof *found);
        for (int32_t i = 0; i < padded; i++) row_squares += found[i] * found[i];
        for (int32_t i = 0; i < padded; i++) row_total += found[i];
        total += row_total, squares += row_squares;
    }
    look->edge_sums[0] = (int64_t)(width - 2) * (height - 2), look->edge_sums[1] = total, look->edge_sums[2] = squares;
}

/* Whether a row or a column spans no more levels than a plain one may. */
INLINE void flats(Look *look) {
    const int32_t width = look->small_width, height = look->small_height;
    uint8_t low[SMALL], high[SMALL];
    int found = 0;
    memset(low, 255, sizeof low);
    memset(high, 0, sizeof high);
    for (int32_t y = 0; y < height; y++) {
        const uint8_t *at = look->grey + (size_t)y * width;
        uint8_t least = 255, most = 0;
        for (int32_t x = 0; x < width; x++) {
            least = at[x] < least ? at[x] : least;
            most = at[x] > most ? at[x] : most;
            low[x] = at[x] < low[x] ? at[x] : low[x];
            high[x] = at[x] > high[x] ? at[x] : high[x];
        }
        found |= most - least <= look->flat;
    }
    for (int32_t x = 0; x < width; x++) found |= high[x] - low[x] <= look->flat;
    look->any_flat = found;
}

/* How many pixels, sums of the channels, sums of their products (rr rg rb gg gb bb), on the copy for chroma. */
INLINE void tints(Look *look) {
    const int32_t width = look->small_width, height = look->small_height, step = look->fine;
    const int32_t across = look->tiny_width;
    int64_t *sums = look->tint_sums;
    memset(sums, 0, sizeof look->tint_sums);
    for (int32_t top = 0; top < height; top += step) {
        const int32_t high = height - top < step ? height - top : step;
        const uint32_t *line = look->small + (size_t)top * width;
        uint32_t red_blue[SMALL], green[SMALL], reduced[TINY];
        int16_t r[TINY], g[TINY], b[TINY];
        if (step > 1) {
            for (int32_t y = 0; y < high; y++) summed(line + (size_t)y * width, width, red_blue, green, y == 0);
            averaged(red_blue, green, width, step, high, reduced);
            line = reduced;
        }
        for (int32_t x = 0; x < across; x++) {
            r[x] = (int16_t)(line[x] & 255);
            g[x] = (int16_t)(line[x] >> 8 & 255);
            b[x] = (int16_t)(line[x] >> 16 & 255);
        }
        int32_t s0 = 0, s1 = 0, s2 = 0, rr = 0, rg = 0, rb = 0, gg = 0, gb = 0, bb = 0;
        for (int32_t x = 0; x < across; x++) {
            s0 += r[x], s1 += g[x], s2 += b[x];
            rr += r[x] * r[x], rg += r[x] * g[x], rb += r[x] * b[x];
            gg += g[x] * g[x], gb += g[x] * b[x], bb += b[x] * b[x];
        }
        sums[1] += s0, sums[2] += s1, sums[3] += s2;
        sums[4] += rr, sums[5] += rg, sums[6] += rb, sums[7] += gg, sums[8] += gb, sums[9] += bb;
    }
    sums[0] = (int64_t)look->tiny_width * look->tiny_height;
}

/* Averages of THUMB x THUMB areas: rows first get THUMB columns, then the columns THUMB rows. */
INLINE void thumbnailed(Look *look) {
    const int32_t width = look->small_width, height = look->small_height;
    uint8_t levels[SMALL][3 * THUMB];
    for (int32_t y = 0; y < height; y++) {
        const uint32_t *line = look->small + (size_t)y * width;
        uint64_t apart[SMALL]; /* 16 bits a channel: red, blue, green */
        for (int32_t x = 0; x < width; x++) apart[x] = (line[x] & 0xFF00FF) | (uint64_t)(line[x] & 0xFF00) << 24;
        for (int32_t i = 0; i < THUMB; i++) {
            const uint64_t *at = apart + look->wide[i][0];
            const int32_t count = look->wide[i][1];
            const uint32_t weight = (uint32_t)look->wide[i][2];
            uint64_t sum = 0;
            for (int32_t x = 0; x < count; x++) sum += at[x];
            /* an average needs no clipping */
            levels[y][3 * i] = (uint8_t)((HALF + (uint32_t)(sum & 0xFFFF) * weight) >> BITS);
            levels[y][3 * i + 1] = (uint8_t)((HALF + (uint32_t)(sum >> 32) * weight) >> BITS);
            levels[y][3 * i + 2] = (uint8_t)((HALF + (uint32_t)(sum >> 16 & 0xFFFF) * weight) >> BITS);
        }
    }
    for (int32_t i = 0; i < THUMB; i++) {
        int32_t sums[3 * THUMB] = {0};
        for (int32_t y = look->tall[i][0]; y < look->tall[i][0] + look->tall[i][1]; y++)
            for (int32_t j = 0; j < 3 * THUMB; j++) sums[j] += levels[y][j];
        for (int32_t j = 0; j < 3 * THUMB; j++)
            look->thumbnail[3 * THUMB * i + j] = clipped(HALF + sums[j] * look->tall[i][2]);
    }
}

/* Which coefficients exceed their median; 0 where the median lies too close to be sure with another DCT. */
INLINE int above_median(const double *low, uint64_t *bits) {
    double ranked[LOW * LOW];
    for (int32_t i = 0; i < LOW * LOW; i++) {
        int32_t j = i;
        for (; j > 0 && ranked[j - 1] > low[i]; j--) ranked[j] = ranked[j - 1];
        ranked[j] = low[i];
    }
    const double under = ranked[LOW * LOW / 2 - 1], over = ranked[LOW * LOW / 2];
    if (!(over - under > 1e-4)) return 0; /* coefficients reach 10^6, and rounding 10^-9 */
    uint64_t found = 0;
    for (int32_t i = 0; i < LOW * LOW; i++) found = found << 1 | (low[i] >= over);
    *bits = found;
    return 1;
}

static double cosines[LOW][SIDE];

/* DCT-II of both axes, of which the low frequencies. */
INLINE void hashed(Look *look) {
    double half[LOW][SIDE], low[LOW * LOW], mirrored[LOW * LOW];
    for (int32_t i = 0; i < LOW; i++) {
        for (int32_t x = 0; x < SIDE; x++) half[i][x] = 0;
        for (int32_t y = 0; y < SIDE; y++)
            for (int32_t x = 0; x < SIDE; x++) half[i][x] += cosines[i][y] * look->shrunk[y * SIDE + x];
        for (int32_t j = 0; j < LOW; j++) {
            double sum = 0;
            for (int32_t x = 0; x < SIDE; x++) sum += half[i][x] * cosines[j][x];
            low[i * LOW + j] = sum;
            mirrored[i * LOW + j] = j & 1 ? -sum : sum;
        }
    }
    look->known = above_median(low, &look->phash);
    look->known_flip = above_median(mirrored, &look->phash_flip);
}

FAST static void looked(Look *look) {
    const int32_t width = look->width, height = look->height, factor = look->factor;
    for (int32_t top = 0; top < height; top += ROWS) {
        const int32_t rows = height - top < ROWS ? height - top : ROWS;
        for (int32_t r = 0; r < rows; r++) {
            const int32_t y = top + r;
            const uint8_t *bytes = look->pixels + (size_t)y * width * look->channels;
            const uint32_t *line = (const uint32_t *)bytes;
            int32_t *luma = look->luma + (size_t)r * width;
            if (look->channels == 3) {
                widened(bytes, width, look->row);
                line = look->row;
            }
            greyed(line, width, luma);
            if (factor == 1) {
                memcpy(look->small + (size_t)y * width, line, (size_t)width * 4);
                bytes_of(luma, width, look->grey + (size_t)y * width);
                continue;
            }
            const int32_t within = y % factor;
            summed(line, width, look->red_blue, look->green, within == 0);
            if (within == factor - 1 || y == height - 1)
                averaged(
                    look->red_blue, look->green, width, factor, within + 1,
                    look->small + (size_t)(y / factor) * look->small_width
                );
        }
        squeezed(look->luma, width, &look->across, look->squeezed + (size_t)top * SIDE, rows);
    }
    stacked(look->squeezed, &look->down, look->shrunk);
    if (factor > 1)
        for (int32_t y = 0; y < look->small_height; y++) {
            const size_t at = (size_t)y * look->small_width;
            int32_t luma[SMALL];
            greyed(look->small + at, look->small_width, luma);
            bytes_of(luma, look->small_width, look->grey + at);
        }
    hashed(look);
    levels(look);
    edges(look);
    flats(look);
    tints(look);
    if (look->has_areas) thumbnailed(look);
}

/* Four bytes a pixel to three. */
FAST static void narrowed(const uint8_t *pixels, Py_ssize_t count, uint8_t *out) {
    Py_ssize_t i = 0;
    for (; i + 8 <= count; i += 4) { /* four at once, of which the last quarter is written over */
        sixteen found;
        memcpy(&found, pixels + 4 * i, sizeof found);
        found = __builtin_shufflevector(found, found, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
        memcpy(out + 3 * i, &found, sizeof found);
    }
    for (; i < count; i++) memcpy(out + 3 * i, pixels + 4 * i, 3);
}

static PyObject *rgb(PyObject *module, PyObject *given) {
    Py_buffer pixels;
    (void)module;
    if (PyObject_GetBuffer(given, &pixels, PyBUF_SIMPLE)) return NULL;
    PyObject *found = NULL;
    if (pixels.len % 4)
        PyErr_SetString(PyExc_ValueError, "pixels must have four bytes each");
    else if ((found = PyBytes_FromStringAndSize(NULL, pixels.len / 4 * 3)))
        narrowed(pixels.buf, pixels.len / 4, (uint8_t *)PyBytes_AsString(found));
    PyBuffer_Release(&pixels);
    return found;
}

/* Weights of an axis, from int32 numbers: how many runs, three numbers for each, then LANES for each pixel. */
static int axis(const Py_buffer *given, int32_t length, Axis *out) {
    const int32_t *numbers = given->buf;
    const Py_ssize_t count = given->len / 4;
    if ((uintptr_t)numbers % 4 || count < 1) return 0;
    const int32_t runs = numbers[0];
    if (runs < 1 || runs > length || count != 1 + 3 * (Py_ssize_t)runs + (Py_ssize_t)LANES * length) return 0;
    for (int32_t i = 0, last = 0; i < runs; i++) {
        const int32_t *at = numbers + 1 + 3 * i;
        if (at[0] < 0 || at[0] > SIDE - LANES || at[1] != last || at[2] <= at[1] || at[2] > length) return 0;
        last = at[2];
        if (i == runs - 1 && last != length) return 0;
    }
    out->runs = runs, out->bounds = numbers + 1, out->weights = numbers + 1 + 3 * runs;
    return 1;
}

static int areas(const Py_buffer *given, int32_t length, Areas out) {
    if (given->len != (Py_ssize_t)sizeof(Areas)) return 0;
    memcpy(out, given->buf, sizeof(Areas));
    for (int32_t i = 0; i < THUMB; i++) {
        const int32_t first = out[i][0], count = out[i][1], weight = out[i][2];
        if (first < 0 || count < 1 || count > 257 || first > length - count || weight < 0) return 0;
        if ((int64_t)count * 255 * weight > INT32_MAX - HALF) return 0;
    }
    return 1;
}

static PyObject *numbers(const int64_t *from, int count) {
    PyObject *found = PyTuple_New(count);
    for (int i = 0; found && i < count; i++) {
        PyObject *each = PyLong_FromLongLong(from[i]);
        if (!each || PyTuple_SetItem(found, i, each)) Py_CLEAR(found);
    }
    return found;
}

static PyObject *hash(int known, uint64_t bits) {
    return known ? PyLong_FromUnsignedLongLong(bits) : Py_NewRef(Py_None);
}

static PyObject *as_tuple(const Look *look) {
    PyObject *thumbnail = look->has_areas
        ? PyBytes_FromStringAndSize((const char *)look->thumbnail, sizeof look->thumbnail) : Py_NewRef(Py_None);
    PyObject *grey = look->any_flat
        ? PyBytes_FromStringAndSize((const char *)look->grey, (Py_ssize_t)look->small_width * look->small_height)
        : Py_NewRef(Py_None);
    return Py_BuildValue(
        "(NNy#NiiNNNN)", hash(look->known, look->phash), hash(look->known_flip, look->phash_flip),
        (const char *)look->shrunk, (Py_ssize_t)sizeof look->shrunk, thumbnail, (int)look->light, (int)look->dark,
        numbers(look->level_sums, 3), numbers(look->edge_sums, 3), numbers(look->tint_sums, 10), grey
    );
}

INLINE int32_t parts(int32_t length, int32_t size) { return (length + size - 1) / size; }

/* Room for the sizes of the look; 0 without memory. */
static void *room(Look *look) {
    const size_t width = (size_t)look->width, small = (size_t)look->small_width * (size_t)look->small_height;
    const size_t sizes[] = {
        ROWS * width * 4, width * 4, width * 4, width * 4, small * 4, (size_t)look->height * SIDE, small + STEP,
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) total += (sizes[i] + 63) / 64 * 64;
    uint8_t *found = malloc(total), *at = found;
    if (!found) return NULL;
    memset(found, 0, ROWS * width * 4); /* rows below the last are weighed too, and thrown away */
    look->luma = (int32_t *)at, at += (sizes[0] + 63) / 64 * 64;
    look->row = (uint32_t *)at, at += (sizes[1] + 63) / 64 * 64;
    look->red_blue = (uint32_t *)at, at += (sizes[2] + 63) / 64 * 64;
    look->green = (uint32_t *)at, at += (sizes[3] + 63) / 64 * 64;
    look->small = (uint32_t *)at, at += (sizes[4] + 63) / 64 * 64;
    look->squeezed = at, at += (sizes[5] + 63) / 64 * 64;
    look->grey = at;
    return found;
}

static PyObject *look_at(PyObject *module, PyObject *given) {
    Py_buffer pixels, across, down, wide = {0}, tall = {0};
    Look *look = calloc(1, sizeof *look);
    void *held = NULL;
    PyObject *found = NULL;
    (void)module;
    if (!look) return PyErr_NoMemory();
    if (!PyArg_ParseTuple(
            given, "y*iiiy*y*iiiz*z*", &pixels, &look->channels, &look->width, &look->height, &across, &down,
            &look->factor, &look->fine, &look->flat, &wide, &tall
        )) {
        free(look);
        return NULL;
    }
    const int32_t width = look->width, height = look->height, factor = look->factor, fine = look->fine;
    look->has_areas = wide.buf && tall.buf;
    if (width < 1 || height < 1 || width > MOST || height > MOST || factor < 1 || factor > REDUCED || fine < 1
        || fine > REDUCED || (look->channels != 3 && look->channels != 4)
        || pixels.len != (Py_ssize_t)width * height * look->channels
        || (look->channels == 4 && (uintptr_t)pixels.buf % 4)) {
        PyErr_SetString(PyExc_ValueError, "the pixels do not have this size");
        goto done;
    }
    look->small_width = parts(width, factor), look->small_height = parts(height, factor);
    look->tiny_width = parts(look->small_width, fine), look->tiny_height = parts(look->small_height, fine);
    if (look->small_width >= SMALL || look->small_height >= SMALL || look->tiny_width >= TINY
        || look->tiny_height >= TINY || !axis(&across, width, &look->across) || !axis(&down, height, &look->down)
        || (look->has_areas
            && !(areas(&wide, look->small_width, look->wide) && areas(&tall, look->small_height, look->tall)))) {
        PyErr_SetString(PyExc_ValueError, "the weights do not fit the image");
        goto done;
    }
    look->pixels = pixels.buf;
    if (!(held = room(look))) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    looked(look);
    Py_END_ALLOW_THREADS
    found = as_tuple(look);
done:
    free(held);
    free(look);
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&across);
    PyBuffer_Release(&down);
    if (wide.obj) PyBuffer_Release(&wide);
    if (tall.obj) PyBuffer_Release(&tall);
    return found;
}

static PyMethodDef methods[] = {
    {"rgb", rgb, METH_O, "RGB bytes of pixels of four bytes."},
    {"look", look_at, METH_VARARGS, "Features from one pass over the pixels; see animesion.images.features."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_pixels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pixels(void) {
    for (int i = 0; i < LOW; i++)
        for (int x = 0; x < SIDE; x++) cosines[i][x] = 2 * cos(3.14159265358979323846 * i * (2 * x + 1) / (2 * SIDE));
    return PyModule_Create(&definition);
}
