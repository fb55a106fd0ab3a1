/* The joins of `animesion.dedup.joins`: which pairs of images are worth a comparison of their pixels.
 *
 * Nothing here decides anything. Every result has a slower equal in Python, which is used where this file was not
 * compiled: tests hold the two against each other. All arithmetic is of whole numbers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
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

enum {
    TABLES = 3,       /* of the codes of points */
    KEY = 19,         /* bits of the key of a table */
    BUCKETS = 1 << KEY,
    CROWDED = 1000,   /* in buckets of more entries a point is compared with the last ones only */
    FOLLOWED = 64,    /* as many of them */
    SIZES = 1 << 16,  /* of points */
    LONGEST = 1 << 14, /* largest logarithm of a size */
    MOST_HITS = 1 << 30, /* of one image: beyond, it does not fit memory */
    SLOTS = 1024,     /* by which the points of one image are found */
    PATIENCE = 1024,  /* images or pairs between two looks at the keyboard */
    MOST_BANDS = 64,
    MOST_AGREEING = 4, /* bands of a key */
    MOST_KEY = 22,    /* bits of such a key */
    AHEAD = 256       /* windows whose buckets are fetched together */
};

/* Two points with codes that are alike, and how they differ. */
typedef struct {
    uint32_t image; /* that is not the one at hand */
    uint32_t point, other; /* of the earlier image, of the later one */
    uint16_t turn; /* of 1/65536 */
    int16_t ratio; /* of sizes, 1/1024 octave */
} Hit;

/* A point, side by side what is asked of it. */
typedef struct {
    uint64_t code;
    uint32_t image;
    uint16_t angle; /* of 1/65536 turn */
    int16_t log;    /* of the size */
} Point;

/* A point of an earlier image and one of a later image whose folds are alike. */
typedef struct {
    uint32_t point, other;
} Close;

/* A point of one image: its key in a table, and the point before it in its slot, from 1 on; 0 for none. */
typedef struct {
    uint32_t key, next;
} Link;

/* Entries of a bucket that a point is compared with. */
typedef struct {
    uint32_t from, until;
} Span;

typedef struct {
    size_t points, images;
    const uint64_t *codes;
    const uint32_t *image; /* of each point, from 0 on without gaps */
    const uint16_t *size, *angle;
    const int16_t *logs;   /* of sizes */
    const uint8_t *is_new; /* of images: whether an earlier search did not have it */
    const uint32_t *known; /* earlier image, later image, mirrored: the pairs of others that it found */
    size_t known_count;
    Point *all;
    uint32_t *firsts;      /* point of each image, and the number of points */
    uint64_t mirror;
    uint32_t limit, votes;
    /* per table: the share of each byte of a code in the key, the start and the fill of each bucket, its entries */
    uint32_t (*keys)[8][256];
    uint32_t *starts[TABLES], *filled[TABLES], *folds[TABLES], *entries[TABLES];
    Span *spans;           /* of the points of one image */
    Link *links;           /* of the points of one image, per table */
    uint32_t slots[TABLES][SLOTS]; /* the last point of that image whose key ends so, from 1 on; 0 for none */
    uint32_t *counts;      /* of hits, per image */
    uint32_t *likely;      /* images with enough of them, and where their hits start */
    Close *close;
    Hit *hits, *grouped;
    size_t close_count, close_room, hit_count, hit_room, group_room;
    uint64_t *bins;
    size_t bin_room;
    uint32_t *found;       /* first image, second image, mirrored */
    size_t found_count, found_room;
} Vote;

/* Room for `count` more items than are there; 0 without memory. */
static int grown(void *list, size_t *room, size_t count, size_t item) {
    if (count <= *room) return 1;
    const size_t wanted = count < 1024 ? 1024 : count + count / 2;
    if (wanted > (size_t)PTRDIFF_MAX / item) return 0;
    void *larger = realloc(*(void **)list, wanted * item);
    if (!larger) return 0;
    memcpy(list, &larger, sizeof larger);
    *room = wanted;
    return 1;
}

/* Half of the bits: two codes differ in at least as many bits as their folds. */
static inline uint32_t fold(uint64_t code) { return (uint32_t)(code ^ code >> 32); }

static inline uint32_t key_of(const Vote *vote, int table, uint64_t code) {
    uint32_t key = 0;
    for (int byte = 0; byte < 8; byte++) key |= vote->keys[table][byte][code >> 8 * byte & 255];
    return key;
}

/* Positions of the folds that differ from one in at most `limit` bits. */
FAST static uint32_t near_folds(
    const uint32_t *restrict folds, uint32_t count, uint32_t one, int limit, uint32_t *restrict near
) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < count; i++) {
        near[found] = i;
        found += __builtin_popcount(folds[i] ^ one) <= limit;
    }
    return found;
}

static int ascending(const void *a, const void *b) {
    const uint64_t first = *(const uint64_t *)a, second = *(const uint64_t *)b;
    return first < second ? -1 : first > second;
}

static void sorted(uint64_t *values, size_t count) {
    if (count > 24) {
        qsort(values, count, sizeof *values, ascending);
        return;
    }
    for (size_t i = 1; i < count; i++) {
        const uint64_t value = values[i];
        size_t at = i;
        for (; at && values[at - 1] > value; at--) values[at] = values[at - 1];
        values[at] = value;
    }
}

/* The bin of angle and size that a hit is in, in one of four grids. */
static inline uint32_t bin_of(const Hit *hit, uint32_t grid) {
    const uint32_t turned = grid & 1 ? 2048 : 0, scaled = LONGEST + (grid & 2 ? 256 : 0);
    return ((hit->turn + turned) & 65535) >> 12 << 8 | (uint32_t)(hit->ratio + (int32_t)scaled) >> 9;
}

static size_t distinct(uint64_t *values, size_t count) {
    size_t found = count > 0;
    sorted(values, count);
    for (size_t i = 1; i < count; i++) found += values[i] != values[i - 1];
    return found;
}

/* Whether enough points of both images have hits in one bin. */
static int agrees(const Hit *hits, size_t count, uint64_t *bins, uint32_t votes) {
    for (uint32_t grid = 0; grid < 4; grid++) {
        for (size_t i = 0; i < count; i++) bins[i] = (uint64_t)bin_of(hits + i, grid) << 32 | hits[i].point;
        sorted(bins, count);
        for (size_t from = 0, until; from < count; from = until) {
            size_t points = 1, others = 0;
            for (until = from + 1; until < count && bins[until] >> 32 == bins[from] >> 32; until++)
                points += bins[until] != bins[until - 1];
            if (points < votes) continue;
            uint64_t *of_bin = bins + count; /* a second list of the same length */
            for (size_t i = 0; i < count; i++)
                if (bin_of(hits + i, grid) == bins[from] >> 32) of_bin[others++] = hits[i].other;
            if (distinct(of_bin, others) >= votes) return 1;
        }
    }
    return 0;
}

/* The first entry of a bucket that is not before a point. */
static inline uint32_t entry_of(const Vote *vote, int table, uint32_t bucket, size_t point) {
    uint32_t from = vote->starts[table][bucket], until = vote->starts[table][bucket + 1];
    while (from < until) {
        const uint32_t middle = from + (until - from) / 2;
        if (vote->entries[table][middle] < point)
            from = middle + 1;
        else
            until = middle;
    }
    return from;
}

/* Whether a point of a bucket is among those that a point of a later image is compared with. */
static inline int is_followed(const Vote *vote, int table, uint32_t bucket, size_t point, uint32_t later) {
    const uint32_t until = vote->starts[table][bucket + 1];
    if (until - vote->starts[table][bucket] <= CROWDED) return 1;
    const uint32_t at = entry_of(vote, table, bucket, point);
    return until - at <= FOLLOWED || vote->all[vote->entries[table][at + FOLLOWED]].image >= later;
}

/* The entries of earlier images, which are those so far, that a point is compared with. */
static Span before(const Vote *vote, int table, size_t q, uint64_t mask) {
    const uint32_t bucket = key_of(vote, table, vote->codes[q] ^ mask);
    const uint32_t from = vote->starts[table][bucket], until = vote->filled[table][bucket];
    const int crowded = vote->starts[table][bucket + 1] - from > CROWDED && until - from > FOLLOWED;
    return (Span){crowded ? until - FOLLOWED : from, until};
}

/* The entries of later images that are compared with a point, once all are there. */
static Span after(const Vote *vote, int table, size_t p, uint64_t mask) {
    const uint32_t bucket = key_of(vote, table, vote->codes[p]), image = vote->image[p];
    const uint32_t at = entry_of(vote, table, bucket, p), until = vote->starts[table][bucket + 1];
    size_t end = vote->points; /* images up to that of the entry FOLLOWED further on, see `is_followed` */
    if (until - vote->starts[table][bucket] > CROWDED && until - at > FOLLOWED)
        end = vote->firsts[vote->all[vote->entries[table][at + FOLLOWED]].image + 1];
    /* those that are compared with the bucket: keys are linear */
    const uint32_t theirs = key_of(vote, table, vote->codes[p] ^ mask);
    return (Span){entry_of(vote, table, theirs, vote->firsts[image + 1]), entry_of(vote, table, theirs, end)};
}

/* Room for one more block of CROWDED pairs of points; 0 without. */
static int has_room(Vote *vote) {
    return vote->close_count <= MOST_HITS
        && grown(&vote->close, &vote->close_room, vote->close_count + CROWDED, sizeof(Close));
}

/* Adds the points among the entries of a span whose folds are like that of another one; 0 without memory. */
static int compared(Vote *vote, int table, Span span, uint32_t one, size_t point, int later) {
    uint32_t near[CROWDED + 1];
    for (size_t from = span.from; from < span.until; from += CROWDED) {
        const uint32_t count = span.until - from < CROWDED ? (uint32_t)(span.until - from) : CROWDED;
        const uint32_t found = near_folds(vote->folds[table] + from, count, one, (int)vote->limit, near);
        if (!has_room(vote)) return 0;
        for (uint32_t i = 0; i < found; i++) {
            const uint32_t entry = vote->entries[table][from + near[i]];
            __builtin_prefetch(vote->all + entry);
            vote->close[vote->close_count++] = later ? (Close){(uint32_t)point, entry} : (Close){entry, (uint32_t)point};
        }
    }
    return 1;
}

/* Makes hits of those of the close points whose codes are alike; 0 without memory. */
static int hit(Vote *vote, int mirrored, int later) {
    const uint64_t mask = mirrored ? vote->mirror : 0;
    if (!grown(&vote->hits, &vote->hit_room, vote->close_count, sizeof(Hit))) return 0;
    vote->hit_count = 0;
    for (size_t i = 0; i < vote->close_count; i++) {
        const Close close = vote->close[i];
        const Point *point = vote->all + close.point, *other = vote->all + close.other;
        if ((uint32_t)__builtin_popcountll(point->code ^ other->code ^ mask) > vote->limit) continue;
        const uint32_t angle = mirrored ? 32768u - other->angle : other->angle;
        vote->hits[vote->hit_count++] = (Hit){
            later ? other->image : point->image, close.point, close.other, (uint16_t)(point->angle - angle),
            (int16_t)(point->log - other->log)
        };
    }
    return 1;
}

/* Hits of the points of an image with those of earlier images, or of later ones; 0 without memory. */
static int collected(Vote *vote, uint32_t image, int mirrored, int later) {
    const uint64_t mask = mirrored ? vote->mirror : 0;
    const size_t first = vote->firsts[image], end = vote->firsts[image + 1];
    Span *span = vote->spans;
    for (size_t point = first; point < end; point++)
        for (int t = 0; t < TABLES; t++, span++) {
            *span = later ? after(vote, t, point, mask) : before(vote, t, point, mask);
            __builtin_prefetch(vote->folds[t] + span->from);
        }
    vote->close_count = 0;
    span = vote->spans;
    for (size_t point = first; point < end; point++)
        for (int t = 0; t < TABLES; t++, span++)
            if (!compared(vote, t, *span, fold(vote->codes[point] ^ mask), point, later)) return 0;
    return hit(vote, mirrored, later);
}

/* Finds the points of an image by their keys from now on. */
static void slotted(Vote *vote, uint32_t image) {
    memset(vote->slots, 0, sizeof vote->slots);
    for (size_t p = vote->firsts[image]; p < vote->firsts[image + 1]; p++)
        for (int t = 0; t < TABLES; t++) {
            Link *link = vote->links + (p - vote->firsts[image]) * TABLES + t;
            link->key = key_of(vote, t, vote->codes[p]);
            uint32_t *slot = vote->slots[t] + link->key % SLOTS;
            link->next = *slot, *slot = (uint32_t)(p - vote->firsts[image]) + 1;
        }
}

/* Adds the points of the image in the slots and of a later one that `collected` finds; 0 without memory. */
static int matched(Vote *vote, uint32_t image, uint32_t later, int mirrored) {
    const uint64_t mask = mirrored ? vote->mirror : 0;
    for (size_t q = vote->firsts[later]; q < vote->firsts[later + 1]; q++)
        for (int t = 0; t < TABLES; t++) {
            const uint32_t key = key_of(vote, t, vote->codes[q] ^ mask);
            const Link *link;
            for (uint32_t at = vote->slots[t][key % SLOTS]; at; at = link->next) {
                const size_t p = vote->firsts[image] + at - 1;
                link = vote->links + (size_t)(at - 1) * TABLES + t;
                if (link->key != key) continue;
                if ((uint32_t)__builtin_popcountll(vote->codes[p] ^ vote->codes[q] ^ mask) > vote->limit) continue;
                if (!is_followed(vote, t, key, p, later)) continue;
                if (!has_room(vote)) return 0;
                vote->close[vote->close_count++] = (Close){(uint32_t)p, (uint32_t)q};
            }
        }
    return 1;
}

/* Adds the images that enough of the hits agree on, earlier ones or later ones; 0 without memory. */
static int counted(Vote *vote, uint32_t image, int mirrored, int later) {
    uint32_t *counts = vote->counts, *likely = vote->likely, found = 0;
    size_t total = 0;
    for (size_t i = 0; i < vote->hit_count; i++)
        if (++counts[vote->hits[i].image] == vote->votes) likely[found++] = vote->hits[i].image;
    for (uint32_t i = 0; i < found; i++) total += counts[likely[i]];
    if (!grown(&vote->grouped, &vote->group_room, total, sizeof(Hit))) return 0;
    if (!grown(&vote->bins, &vote->bin_room, 2 * total, sizeof(uint64_t))) return 0;
    if (!grown(&vote->found, &vote->found_room, vote->found_count + 3 * (size_t)found, sizeof(uint32_t))) return 0;
    /* the counts of likely images become where their hits end: those of the others stay below `votes` */
    total = 0;
    for (uint32_t i = 0; i < found; i++) {
        const uint32_t count = counts[likely[i]];
        counts[likely[i]] = (uint32_t)total + vote->votes;
        total += count;
    }
    for (size_t i = 0; i < vote->hit_count; i++) {
        const uint32_t at = counts[vote->hits[i].image];
        if (at < vote->votes) continue;
        vote->grouped[at - vote->votes] = vote->hits[i];
        counts[vote->hits[i].image]++;
    }
    for (uint32_t i = 0, from = 0; i < found; i++) {
        const uint32_t until = counts[likely[i]] - vote->votes;
        if (agrees(vote->grouped + from, until - from, vote->bins, vote->votes)) {
            uint32_t *pair = vote->found + vote->found_count;
            pair[0] = later ? image : likely[i], pair[1] = later ? likely[i] : image, pair[2] = (uint32_t)mirrored;
            vote->found_count += 3;
        }
        from = until;
    }
    for (size_t i = 0; i < vote->hit_count; i++) counts[vote->hits[i].image] = 0;
    return 1;
}

/* Looks images up among those before them, and adds them to the tables; 0 without memory. */
static int passed(Vote *vote, size_t from, size_t until) {
    for (uint32_t image = (uint32_t)from; image < until; image++) {
        for (int mirrored = 0; mirrored < 2 && (!vote->is_new || vote->is_new[image]); mirrored++)
            if (!collected(vote, image, mirrored, 0) || !counted(vote, image, mirrored, 0)) return 0;
        for (int t = 0; t < TABLES; t++)
            for (size_t p = vote->firsts[image]; p < vote->firsts[image + 1]; p++) {
                const uint32_t slot = vote->filled[t][key_of(vote, t, vote->codes[p])]++;
                vote->folds[t][slot] = fold(vote->codes[p]), vote->entries[t][slot] = (uint32_t)p;
            }
    }
    return 1;
}

/* Looks new images up among the others after them, once all are in the tables; 0 without memory. */
static int returned(Vote *vote, size_t from, size_t until) {
    for (uint32_t image = (uint32_t)from; vote->is_new && image < until; image++)
        for (int mirrored = 0; mirrored < 2 && vote->is_new[image]; mirrored++) {
            if (!collected(vote, image, mirrored, 1)) return 0;
            size_t kept = 0;
            for (size_t i = 0; i < vote->hit_count; i++)
                if (!vote->is_new[vote->hits[i].image]) vote->hits[kept++] = vote->hits[i];
            vote->hit_count = kept;
            if (!counted(vote, image, mirrored, 1)) return 0;
        }
    return 1;
}

/* Adds known pairs again, if they are still found: new points may have crowded others out; 0 without memory. */
static int confirmed(Vote *vote, size_t from, size_t until) {
    for (const uint32_t *pair = vote->known + 3 * from; pair < vote->known + 3 * until; pair += 3) {
        if (pair == vote->known || pair[0] != pair[-3]) slotted(vote, pair[0]);
        vote->close_count = 0;
        if (!matched(vote, pair[0], pair[1], (int)pair[2]) || !hit(vote, (int)pair[2], 0)) return 0;
        if (!counted(vote, pair[1], (int)pair[2], 0)) return 0;
    }
    return 1;
}

/* The tables, empty, with the room that each bucket will need; 0 without memory. */
static int laid_out(Vote *vote, const uint8_t *bits) {
    size_t longest = 0, run = 0;
    for (size_t p = 0; p < vote->points; p++) {
        run = p && vote->image[p] == vote->image[p - 1] ? run + 1 : 1;
        longest = run > longest ? run : longest;
    }
    const size_t points = vote->points + 1;
    vote->firsts = malloc((vote->images + 1) * sizeof *vote->firsts);
    vote->links = calloc(longest + 1, TABLES * sizeof *vote->links);
    vote->keys = calloc(TABLES, sizeof *vote->keys);
    vote->spans = calloc(longest + 1, TABLES * sizeof *vote->spans);
    vote->counts = calloc(vote->images + 1, sizeof *vote->counts);
    vote->likely = calloc(vote->images + 1, sizeof *vote->likely);
    vote->all = malloc(points * sizeof *vote->all);
    if (!vote->firsts || !vote->links || !vote->all || !vote->keys || !vote->spans || !vote->counts || !vote->likely)
        return 0;
    for (size_t p = vote->points; p-- > 0;) vote->firsts[vote->image[p]] = (uint32_t)p;
    vote->firsts[vote->images] = (uint32_t)vote->points;
    for (size_t p = 0; p < vote->points; p++)
        vote->all[p] = (Point){vote->codes[p], vote->image[p], vote->angle[p], vote->logs[vote->size[p]]};
    for (int t = 0; t < TABLES; t++) {
        for (int byte = 0; byte < 8; byte++)
            for (uint32_t value = 0; value < 256; value++)
                for (int i = 0; i < KEY; i++)
                    if (bits[t * KEY + i] / 8 == byte && value >> bits[t * KEY + i] % 8 & 1)
                        vote->keys[t][byte][value] |= 1u << i;
        vote->starts[t] = calloc(BUCKETS + 1, sizeof(uint32_t));
        vote->filled[t] = malloc(BUCKETS * sizeof(uint32_t));
        vote->folds[t] = malloc(points * sizeof(uint32_t));
        vote->entries[t] = malloc(points * sizeof(uint32_t));
        if (!vote->starts[t] || !vote->filled[t] || !vote->folds[t] || !vote->entries[t]) return 0;
        for (size_t p = 0; p < vote->points; p++) vote->starts[t][key_of(vote, t, vote->codes[p]) + 1]++;
        for (uint32_t bucket = 0; bucket < BUCKETS; bucket++) vote->starts[t][bucket + 1] += vote->starts[t][bucket];
        memcpy(vote->filled[t], vote->starts[t], BUCKETS * sizeof(uint32_t));
    }
    return 1;
}

static void released(Vote *vote) {
    for (int t = 0; t < TABLES; t++)
        free(vote->starts[t]), free(vote->filled[t]), free(vote->folds[t]), free(vote->entries[t]);
    free(vote->firsts), free(vote->links), free(vote->all), free(vote->keys), free(vote->spans), free(vote->counts), free(vote->likely);
    free(vote->close), free(vote->hits), free(vote->grouped), free(vote->bins), free(vote->found);
}

/* Whether the buffers belong together, and what the loops rely on holds. */
static int is_sound(
    Vote *vote, const Py_buffer *codes, const Py_buffer *image, const Py_buffer *size, const Py_buffer *angle,
    const Py_buffer *logs, const Py_buffer *bits, const Py_buffer *is_new, const Py_buffer *known
) {
    const Py_ssize_t points = codes->len / 8;
    if (codes->len % 8 || points > (Py_ssize_t)(UINT32_MAX - 1) || image->len != 4 * points || size->len != 2 * points
        || angle->len != 2 * points || logs->len != 2 * SIZES || bits->len != TABLES * KEY
        || (uintptr_t)codes->buf % 8 || (uintptr_t)image->buf % 4 || (uintptr_t)size->buf % 2
        || (uintptr_t)angle->buf % 2 || (uintptr_t)logs->buf % 2 || vote->votes < 1 || vote->votes > LONGEST)
        return 0;
    vote->points = (size_t)points;
    vote->codes = codes->buf, vote->image = image->buf, vote->size = size->buf, vote->angle = angle->buf;
    vote->logs = logs->buf;
    for (int i = 0; i < TABLES * KEY; i++)
        if (((const uint8_t *)bits->buf)[i] > 63) return 0;
    for (int i = 0; i < SIZES; i++)
        if (vote->logs[i] < 0 || vote->logs[i] > LONGEST) return 0;
    for (size_t p = 0; p < vote->points; p++)
        if (p ? vote->image[p] - vote->image[p - 1] > 1 : vote->image[p] != 0) return 0;
    vote->images = vote->points ? (size_t)vote->image[vote->points - 1] + 1 : 0;
    vote->is_new = is_new->len ? is_new->buf : NULL, vote->known = known->buf;
    vote->known_count = (size_t)known->len / (3 * sizeof(uint32_t));
    if ((is_new->len && (size_t)is_new->len != vote->images) || (known->len && !is_new->len)
        || known->len % (Py_ssize_t)(3 * sizeof(uint32_t)) || (uintptr_t)known->buf % 4)
        return 0;
    for (size_t i = 0; i < vote->known_count; i++) {
        const uint32_t *pair = vote->known + 3 * i;
        if (pair[0] >= pair[1] || pair[1] >= vote->images || pair[2] > 1) return 0;
        if (vote->is_new[pair[0]] || vote->is_new[pair[1]]) return 0;
    }
    return 1;
}

static PyObject *vote_pairs(PyObject *module, PyObject *given) {
    Py_buffer codes, image, size, angle, logs, bits, is_new, known;
    Vote vote = {0};
    unsigned long long mirror;
    PyObject *found = NULL;
    int going;
    (void)module;
    if (!PyArg_ParseTuple(
            given, "y*y*y*y*y*y*KIIy*y*", &codes, &image, &size, &angle, &logs, &bits, &mirror, &vote.limit,
            &vote.votes, &is_new, &known
        ))
        return NULL;
    vote.mirror = mirror;
    vote.limit = vote.limit > 64 ? 64 : vote.limit;
    if (!is_sound(&vote, &codes, &image, &size, &angle, &logs, &bits, &is_new, &known)) {
        PyErr_SetString(PyExc_ValueError, "the arrays do not describe the points of images in order");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    going = laid_out(&vote, bits.buf);
    Py_END_ALLOW_THREADS
    int (*const steps[])(Vote *, size_t, size_t) = {passed, returned, confirmed};
    const size_t ends[] = {vote.images, vote.images, vote.known_count};
    for (int step = 0; step < 3; step++)
        for (size_t from = 0; going && from < ends[step]; from += PATIENCE) {
            Py_BEGIN_ALLOW_THREADS
            going = steps[step](&vote, from, ends[step] - from < PATIENCE ? ends[step] : from + PATIENCE);
            Py_END_ALLOW_THREADS
            if (PyErr_CheckSignals()) goto done;
        }
    if (!going) {
        PyErr_NoMemory();
        goto done;
    }
    found = PyBytes_FromStringAndSize((const char *)vote.found, (Py_ssize_t)(vote.found_count * sizeof(uint32_t)));
done:
    released(&vote);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&image);
    PyBuffer_Release(&size);
    PyBuffer_Release(&angle);
    PyBuffer_Release(&logs);
    PyBuffer_Release(&bits);
    PyBuffer_Release(&is_new);
    PyBuffer_Release(&known);
    return found;
}

/* Pairs so far, each with its nearest window: a hash table with open addressing. */
typedef struct {
    size_t count, slots;
    uint64_t *pairs;  /* image of the hash, image of the windows; EMPTY in a free slot */
    uint16_t *nearest; /* distance, window */
} Found;

#define EMPTY UINT64_MAX /* no image has this number */

static size_t slot_of(const Found *found, uint64_t pair) {
    size_t slot = (size_t)((pair * 0x9E3779B97F4A7C15u) >> 20) & (found->slots - 1);
    while (found->pairs[slot] != EMPTY && found->pairs[slot] != pair) slot = (slot + 1) & (found->slots - 1);
    return slot;
}

/* Twice the slots; 0 without memory. */
static int doubled(Found *found) {
    Found larger = {found->count, found->slots ? 2 * found->slots : 4096, NULL, NULL};
    if (larger.slots > SIZE_MAX / 32) return 0;
    larger.pairs = malloc(larger.slots * sizeof *larger.pairs);
    larger.nearest = malloc(larger.slots * sizeof *larger.nearest);
    if (!larger.pairs || !larger.nearest) {
        free(larger.pairs), free(larger.nearest);
        return 0;
    }
    memset(larger.pairs, 255, larger.slots * sizeof *larger.pairs);
    for (size_t i = 0; i < found->slots; i++)
        if (found->pairs[i] != EMPTY) {
            const size_t slot = slot_of(&larger, found->pairs[i]);
            larger.pairs[slot] = found->pairs[i], larger.nearest[slot] = found->nearest[i];
        }
    free(found->pairs), free(found->nearest);
    *found = larger;
    return 1;
}

/* Keeps the nearest window of a pair, the lowest on ties; 0 without memory. */
static int kept(Found *found, uint32_t i, uint32_t j, uint32_t distance, uint32_t window) {
    if (2 * found->count >= found->slots && !doubled(found)) return 0;
    const uint64_t pair = (uint64_t)i << 32 | j;
    const uint16_t nearest = (uint16_t)(distance << 8 | window);
    const size_t slot = slot_of(found, pair);
    if (found->pairs[slot] == EMPTY) {
        found->pairs[slot] = pair, found->nearest[slot] = nearest;
        found->count++;
    } else if (nearest < found->nearest[slot])
        found->nearest[slot] = nearest;
    return 1;
}

typedef struct {
    size_t hashes, images, columns;
    const uint64_t *hash, *windows;
    const uint32_t *image; /* of each hash */
    uint32_t radius, bands, agreeing, key_bits;
    uint32_t edges[MOST_BANDS + 1], chosen[MOST_AGREEING]; /* lowest bit of each band; the bands of the key */
    uint32_t *starts, *order; /* of the buckets, and the image of each entry */
    uint64_t *ordered; /* the hash of each entry */
    Found found;
} Join;

static inline uint32_t bands_of(const Join *join, uint64_t hash) {
    uint64_t key = 0;
    for (uint32_t i = 0; i < join->agreeing; i++) {
        const uint32_t low = join->edges[join->chosen[i]], width = join->edges[join->chosen[i] + 1] - low;
        /* a key is cut to MOST_KEY bits: only the first band may have 64 */
        key = width < 64 ? key << width | (hash >> low & (((uint64_t)1 << width) - 1)) : hash;
    }
    return (uint32_t)(key & ((1u << join->key_bits) - 1));
}

/* Whether two hashes agree in a band that is not of the key but before its last one: another choice has found them. */
static inline int found_before(const Join *join, uint64_t gap) {
    for (uint32_t band = 0, at = 0; at < join->agreeing; band++) {
        if (band == join->chosen[at]) {
            at++;
            continue;
        }
        const uint32_t low = join->edges[band], width = join->edges[band + 1] - low;
        if (!(gap >> low & (((uint64_t)1 << width) - 1))) return 1;
    }
    return 0;
}

/* Sorts the hashes by the chosen bands. */
static void bucketed(Join *join) {
    join->key_bits = 0;
    for (uint32_t i = 0; i < join->agreeing; i++)
        join->key_bits += join->edges[join->chosen[i] + 1] - join->edges[join->chosen[i]];
    join->key_bits = join->key_bits < MOST_KEY ? join->key_bits : MOST_KEY;
    const size_t buckets = (size_t)1 << join->key_bits;
    memset(join->starts, 0, (buckets + 2) * sizeof *join->starts);
    /* two further on: filling moves the start of a bucket to that of the next one */
    for (size_t i = 0; i < join->hashes; i++) join->starts[bands_of(join, join->hash[i]) + 2]++;
    for (size_t bucket = 2; bucket < buckets + 2; bucket++) join->starts[bucket] += join->starts[bucket - 1];
    for (size_t i = 0; i < join->hashes; i++) {
        const uint32_t at = join->starts[bands_of(join, join->hash[i]) + 1]++;
        join->ordered[at] = join->hash[i], join->order[at] = join->image[i];
    }
}

/* Looks all windows up in the buckets of the chosen bands; 0 without memory. */
FAST static int looked_up(Join *join) {
    const size_t total = join->images * join->columns;
    uint32_t from[AHEAD], until[AHEAD];
    for (size_t first = 0; first < total; first += AHEAD) {
        const size_t count = total - first < AHEAD ? total - first : AHEAD;
        for (size_t i = 0; i < count; i++) {
            from[i] = bands_of(join, join->windows[first + i]);
            __builtin_prefetch(join->starts + from[i]);
        }
        for (size_t i = 0; i < count; i++) {
            until[i] = join->starts[from[i] + 1], from[i] = join->starts[from[i]];
            __builtin_prefetch(join->ordered + from[i]);
        }
        for (size_t i = 0; i < count; i++) {
            const uint64_t window = join->windows[first + i];
            for (uint32_t at = from[i]; at < until[i]; at++) {
                const uint64_t gap = join->ordered[at] ^ window;
                const uint32_t distance = (uint32_t)__builtin_popcountll(gap);
                if (distance > join->radius) continue;
                const uint32_t image = (uint32_t)((first + i) / join->columns);
                if (image == join->order[at] || found_before(join, gap)) continue;
                if (!kept(&join->found, join->order[at], image, distance, (uint32_t)((first + i) % join->columns)))
                    return 0;
            }
        }
    }
    return 1;
}

/* The next choice of bands; 0 after the last. */
static int chosen_next(Join *join) {
    for (uint32_t i = join->agreeing; i-- > 0;)
        if (join->chosen[i] < join->bands - join->agreeing + i) {
            join->chosen[i]++;
            for (i++; i < join->agreeing; i++) join->chosen[i] = join->chosen[i - 1] + 1;
            return 1;
        }
    return 0;
}

/* The pairs as rows of two images and a window. */
static PyObject *as_rows(const Found *found) {
    PyObject *rows = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(found->count * 3 * sizeof(uint32_t)));
    if (!rows) return NULL;
    uint32_t *at = (uint32_t *)(void *)PyBytes_AsString(rows);
    for (size_t i = 0; i < found->slots; i++)
        if (found->pairs[i] != EMPTY) {
            const uint32_t row[3] = {
                (uint32_t)(found->pairs[i] >> 32), (uint32_t)found->pairs[i], found->nearest[i] & 255
            };
            memcpy(at, row, sizeof row);
            at += 3;
        }
    return rows;
}

static PyObject *window_pairs(PyObject *module, PyObject *given) {
    Py_buffer hashes, image, windows;
    Join join = {0};
    unsigned int columns;
    PyObject *rows = NULL;
    int going = 0, more = 1;
    (void)module;
    if (!PyArg_ParseTuple(
            given, "y*y*y*III", &hashes, &image, &windows, &columns, &join.radius, &join.agreeing
        ))
        return NULL;
    const size_t room = (size_t)hashes.len / 8;
    if (hashes.len % 8 || room >= UINT32_MAX || image.len != 4 * (Py_ssize_t)room || columns < 1 || columns > 256
        || windows.len % (Py_ssize_t)(8 * columns) || (size_t)windows.len / (8 * columns) >= UINT32_MAX
        || (uintptr_t)hashes.buf % 8 || (uintptr_t)image.buf % 4 || (uintptr_t)windows.buf % 8 || join.radius > 64
        || join.agreeing > MOST_AGREEING || (join.agreeing && join.radius + join.agreeing > MOST_BANDS)) {
        PyErr_SetString(PyExc_ValueError, "the arrays are not hashes of images and of their windows");
        goto done;
    }
    join.hashes = room, join.hash = hashes.buf, join.image = image.buf, join.windows = windows.buf;
    join.columns = columns, join.images = (size_t)windows.len / (8 * columns);
    join.bands = join.agreeing ? join.radius + join.agreeing : 0;
    for (uint32_t band = 0; join.bands && band <= join.bands; band++) join.edges[band] = 64 * band / join.bands;
    for (uint32_t i = 0; i < join.agreeing; i++) join.chosen[i] = i;
    join.starts = malloc((((size_t)1 << MOST_KEY) + 2) * sizeof *join.starts);
    join.ordered = malloc((room + 1) * sizeof *join.ordered);
    join.order = malloc((room + 1) * sizeof *join.order);
    if (!join.starts || !join.ordered || !join.order) {
        PyErr_NoMemory();
        goto done;
    }
    while (more) {
        Py_BEGIN_ALLOW_THREADS
        bucketed(&join);
        going = looked_up(&join);
        Py_END_ALLOW_THREADS
        if (!going) {
            PyErr_NoMemory();
            goto done;
        }
        if (PyErr_CheckSignals()) goto done;
        more = chosen_next(&join);
    }
    rows = as_rows(&join.found);
done:
    free(join.starts), free(join.ordered), free(join.order), free(join.found.pairs), free(join.found.nearest);
    PyBuffer_Release(&hashes);
    PyBuffer_Release(&image);
    PyBuffer_Release(&windows);
    return rows;
}

static PyMethodDef methods[] = {
    {"vote_pairs", vote_pairs, METH_VARARGS, "See animesion.dedup.joins.vote_pairs."},
    {"window_pairs", window_pairs, METH_VARARGS, "See animesion.dedup.joins.window_pairs."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_joins", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__joins(void) { return PyModule_Create(&definition); }
