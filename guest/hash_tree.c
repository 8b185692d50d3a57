/* hash-tree [-l] DIR: one line per file below DIR, with everything that an image has to keep.
 *
 * The same program describes the source on the host and the file system that a guest sees, so that the two texts can be compared
 * line by line. It is linked statically: the guest may have any C library or none.
 *
 * A line has these fields, with tabs between: path, type letter as in `ls -l`, permission bits (octal), owner, group, link count,
 * size (devices: major:minor, directories: -), modification time, content (files: sha256, symbolic links: target), extended
 * attributes (name=hex of value, sorted), and for a file with several names the first of them. Paths, targets and attribute names
 * have every byte outside printable ASCII as \xNN. Files come in byte order of their names within each directory.
 *
 * -l  writes 2 + number of subdirectories as link count of a directory. For sources: not every file system counts like that.
 *
 * Exit code 0: all was read. 1: something was not; its line ends with "! what: reason". 2: bad usage.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

static int failed, computed_links;

/* Names of the directories on the way to the current one, joined with '/'. */
static char *where;
static size_t where_size, where_len;

static void *grow(void *p, size_t size)
{
    p = realloc(p, size);
    if (!p) {
        perror("hash-tree");
        exit(1);
    }
    return p;
}

/* ---- SHA-256 (FIPS 180-4) */

struct sha256 {
    uint32_t h[8];
    uint64_t length;
    uint8_t block[64];
};

static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t ror(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(uint32_t h[8], const uint8_t *p)
{
    uint32_t w[64], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], k = h[7];

    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = k + (ror(e, 6) ^ ror(e, 11) ^ ror(e, 25)) + ((e & f) ^ (~e & g)) + sha256_k[i] + w[i];
        uint32_t t2 = (ror(a, 2) ^ ror(a, 13) ^ ror(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        k = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += k;
}

static void sha256_start(struct sha256 *s)
{
    static const uint32_t h[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };

    memcpy(s->h, h, sizeof h);
    s->length = 0;
}

static void sha256_add(struct sha256 *s, const uint8_t *p, size_t n)
{
    size_t have = s->length % 64;

    s->length += n;
    if (have) {
        size_t take = n < 64 - have ? n : 64 - have;
        memcpy(s->block + have, p, take);
        p += take, n -= take;
        if (have + take < 64)
            return;
        sha256_block(s->h, s->block);
    }
    for (; n >= 64; p += 64, n -= 64)
        sha256_block(s->h, p);
    memcpy(s->block, p, n);
}

static void sha256_print(struct sha256 *s)
{
    uint64_t bits = s->length * 8;
    uint8_t end[72] = { 0x80 };
    size_t pad = (s->length % 64 < 56 ? 56 : 120) - s->length % 64;

    for (int i = 0; i < 8; i++)
        end[pad + i] = bits >> (56 - 8 * i);
    sha256_add(s, end, pad + 8);
    for (int i = 0; i < 8; i++)
        printf("%08x", s->h[i]);
}

/* ---- the description of one file */

static void print_escaped(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char c = s[i];
        if (c > 0x20 && c < 0x7f && c != '\\')
            putchar(c);
        else
            printf("\\x%02x", c);
    }
}

static void complain(const char *what)
{
    printf("\t! %s: %s", what, strerror(errno));
    failed = 1;
}

static void print_content(const char *name)
{
    static uint8_t buf[1 << 18];
    struct sha256 s;
    ssize_t n;
    int fd = open(name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);

    if (fd < 0) {
        complain("open");
        return;
    }
    sha256_start(&s);
    while ((n = read(fd, buf, sizeof buf)) > 0)
        sha256_add(&s, buf, n);
    if (n < 0)
        complain("read");
    else
        sha256_print(&s);
    close(fd);
}

static void print_target(const char *name)
{
    char target[4097];
    ssize_t n = readlink(name, target, sizeof target);

    if (n < 0)
        complain("readlink");
    else
        print_escaped(target, n);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static void print_xattrs(const char *name)
{
    static char list[65536], value[65536];
    char *names[4096];
    size_t count = 0;
    ssize_t n = llistxattr(name, list, sizeof list);

    if (n < 0) {
        if (errno == ENOTSUP)
            putchar('-');
        else
            complain("listxattr");
        return;
    }
    for (char *p = list; p < list + n && count < 4096; p += strlen(p) + 1)
        names[count++] = p;
    qsort(names, count, sizeof *names, by_name);
    if (!count)
        putchar('-');
    for (size_t i = 0; i < count; i++) {
        n = lgetxattr(name, names[i], value, sizeof value);
        if (n < 0) {
            complain(names[i]);
            continue;
        }
        printf(i ? "," : "");
        print_escaped(names[i], strlen(names[i]));
        putchar('=');
        for (ssize_t j = 0; j < n; j++)
            printf("%02x", (unsigned char)value[j]);
    }
}

/* Files with several names: which name came first. */
static struct link {
    dev_t dev;
    ino_t ino;
    char *first;
} *links;
static size_t link_count;

static void print_first_name(const struct stat *st, const char *path)
{
    for (size_t i = 0; i < link_count; i++)
        if (links[i].ino == st->st_ino && links[i].dev == st->st_dev) {
            print_escaped(links[i].first, strlen(links[i].first));
            return;
        }
    if (link_count % 1024 == 0)
        links = grow(links, (link_count + 1024) * sizeof *links);
    links[link_count].dev = st->st_dev;
    links[link_count].ino = st->st_ino;
    links[link_count].first = strdup(path);
    if (!links[link_count++].first)
        exit(1);
    print_escaped(path, strlen(path));
}

static char type_letter(mode_t mode)
{
    switch (mode & S_IFMT) {
    case S_IFREG: return '-';
    case S_IFDIR: return 'd';
    case S_IFLNK: return 'l';
    case S_IFCHR: return 'c';
    case S_IFBLK: return 'b';
    case S_IFIFO: return 'p';
    case S_IFSOCK: return 's';
    }
    return '?';
}

/* `name` is relative to the working directory; the path to print is `where`. */
static void print_file(const char *name, const struct stat *st, uintmax_t nlink)
{
    print_escaped(where, where_len);
    printf("\t%c\t%04o\t%u\t%u\t%ju\t", type_letter(st->st_mode), st->st_mode & 07777, st->st_uid, st->st_gid, nlink);
    if (S_ISDIR(st->st_mode))
        putchar('-');
    else if (S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode))
        printf("%u:%u", major(st->st_rdev), minor(st->st_rdev));
    else
        printf("%jd", (intmax_t)st->st_size);
    printf("\t%jd.%09ld\t", (intmax_t)st->st_mtim.tv_sec, st->st_mtim.tv_nsec);
    if (S_ISREG(st->st_mode))
        print_content(name);
    else if (S_ISLNK(st->st_mode))
        print_target(name);
    else
        putchar('-');
    putchar('\t');
    print_xattrs(name);
    putchar('\t');
    if (!S_ISDIR(st->st_mode) && st->st_nlink > 1)
        print_first_name(st, where);
    else
        putchar('-');
    putchar('\n');
}

/* ---- the walk; the working directory follows it, so that paths may have any length */

static void walk(const char *name, const struct stat *st);

/* The open directory's names, sorted; NULL and a complaint when that fails. */
static char **list_names(DIR *dir, size_t *count)
{
    char **names = NULL;
    struct dirent *entry;

    *count = 0;
    while ((errno = 0, entry = readdir(dir))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (*count % 256 == 0)
            names = grow(names, (*count + 256) * sizeof *names);
        if (!(names[(*count)++] = strdup(entry->d_name)))
            exit(1);
    }
    if (errno) {
        print_escaped(where, where_len);
        complain("readdir");
        putchar('\n');
    }
    if (*count)
        qsort(names, *count, sizeof *names, by_name);
    return names;
}

static void walk_directory(const char *name, const struct stat *st)
{
    size_t count, dirs = 0, len = where_len;
    struct stat *stats;
    char **names;
    int up = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = opendir(name);

    if (up < 0 || !dir) {
        print_escaped(where, where_len);
        complain("opendir");
        putchar('\n');
        return;
    }
    names = list_names(dir, &count);
    stats = grow(NULL, (count + 1) * sizeof *stats);
    for (size_t i = 0; i < count; i++) {
        if (fstatat(dirfd(dir), names[i], &stats[i], AT_SYMLINK_NOFOLLOW) < 0) {
            print_escaped(where, where_len);
            putchar('/');
            print_escaped(names[i], strlen(names[i]));
            complain("stat");
            putchar('\n');
            stats[i].st_mode = 0;
        }
        dirs += S_ISDIR(stats[i].st_mode);
    }
    print_file(name, st, computed_links ? 2 + dirs : st->st_nlink);
    if (fchdir(dirfd(dir)) < 0) {
        perror("hash-tree: fchdir");
        exit(1);
    }
    for (size_t i = 0; i < count; i++) {
        size_t n = strlen(names[i]);
        if (len + n + 2 > where_size)
            where = grow(where, where_size = 2 * (len + n + 2));
        where[len] = '/';
        memcpy(where + len + 1, names[i], n + 1);
        where_len = len + 1 + n;
        if (stats[i].st_mode)
            walk(names[i], &stats[i]);
        free(names[i]);
    }
    where_len = len;
    where[len] = 0;
    if (fchdir(up) < 0) {
        perror("hash-tree: fchdir");
        exit(1);
    }
    close(up);
    closedir(dir);
    free(names);
    free(stats);
}

static void walk(const char *name, const struct stat *st)
{
    if (S_ISDIR(st->st_mode))
        walk_directory(name, st);
    else
        print_file(name, st, st->st_nlink);
}

int main(int argc, char **argv)
{
    struct stat st;

    if (argc == 3 && !strcmp(argv[1], "-l")) {
        computed_links = 1;
        argv++;
    } else if (argc != 2) {
        fprintf(stderr, "usage: hash-tree [-l] DIR\n");
        return 2;
    }
    if (chdir(argv[1]) < 0 || lstat(".", &st) < 0) {
        fprintf(stderr, "hash-tree: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    where = grow(NULL, where_size = 256);
    strcpy(where, ".");
    where_len = 1;
    walk(".", &st);
    if (fflush(stdout) || ferror(stdout)) {
        perror("hash-tree: output");
        return 1;
    }
    return failed;
}
