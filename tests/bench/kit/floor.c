/* A vhost-user-fs back-end that does nothing but answer: constants for names and attributes, one memcpy out of a
 * mapped file for a read. What it costs is what rings, wake-ups and copying cost by themselves: the floor under
 * any other back-end on the same machine.
 *
 *   cc -O2 -pthread -o floor floor.c
 *   floor --socket PATH --data FILE [--files N] [--dirs N] [--names N] [--queues N] [--poll-us N]
 *
 * The tree: FILE cut into N equal files "large000", ... (8), N directories "dir00000", ... (100) of N names each,
 * "file0000", ... (30), all of them one small file. A name that begins with "absent" is not there. A thread serves
 * each queue. It sleeps when its ring is empty, after having looked at it for --poll-us (0).
 *
 * It serves one connection and ends with it. Split rings with indirect descriptors and event indices (virtio 1.2,
 * 2.7); vhost-user messages as in QEMU's docs/interop/vhost-user.rst; FUSE as in Linux, include/uapi/linux/fuse.h.
 * For little-endian machines. Every length and address of the driver is checked before it is used; what makes no
 * sense is completed with a used length of 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_QUEUES = 17, MAX_REGIONS = 64, MAX_CHAIN = 1024, MAX_FDS = 8, MAX_ARGUMENTS = 512 };

static void die(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fputs("floor: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    exit(1);
}

/* --- the tree ------------------------------------------------------------------------------------------------- */

enum { ROOT = 1, FIRST_FILE = 2, NAME_LEN = 8 };
enum { LOOKUP = 1, FORGET = 2, GETATTR = 3, OPEN = 14, READ = 15, RELEASE = 18, INIT = 26, OPENDIR = 27,
       RELEASEDIR = 29, DESTROY = 38, BATCH_FORGET = 42, READDIRPLUS = 44 };
enum { IN_HEADER = 40, OUT_HEADER = 16, ATTR_OUT = 104, ENTRY_OUT = 128, DIRENT = 24 };
enum { ENTRY = ENTRY_OUT + DIRENT + NAME_LEN, SMALL = 4096 };

static const uint8_t *data;
static uint64_t file_size;
static unsigned n_files = 8, n_dirs = 100, n_names = 30, n_queues = 16, poll_us;
static uint8_t *root_list, *dir_list;   /* what READDIRPLUS answers, whole */

static unsigned first_dir(void) { return FIRST_FILE + n_files; }
static unsigned small_file(void) { return first_dir() + n_dirs; }
static bool is_dir(uint64_t node) { return node == ROOT || (node >= first_dir() && node < small_file()); }
static bool is_large(uint64_t node) { return node >= FIRST_FILE && node < first_dir(); }

static void put32(uint8_t *p, uint32_t value) { memcpy(p, &value, 4); }
static void put64(uint8_t *p, uint64_t value) { memcpy(p, &value, 8); }
static uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return v; }

/* struct fuse_attr, 88 bytes. */
static void put_attr(uint8_t *p, uint64_t node) {
    uint64_t size = is_dir(node) ? 4096 : is_large(node) ? file_size : SMALL;
    memset(p, 0, 88);
    put64(p, node);
    put64(p + 8, size);
    put64(p + 16, (size + 511) / 512);
    put32(p + 60, is_dir(node) ? S_IFDIR | 0755 : S_IFREG | 0644);
    put32(p + 64, is_dir(node) ? 2 : 1);
    put32(p + 80, 4096);
}

/* struct fuse_entry_out: valid for an hour. */
static void put_entry(uint8_t *p, uint64_t node) {
    memset(p, 0, 40);
    put64(p, node);
    put64(p + 16, 3600);
    put64(p + 24, 3600);
    put_attr(p + 40, node);
}

/* struct fuse_direntplus with a name of NAME_LEN bytes: no padding. */
static void put_dirent(uint8_t *list, unsigned i, uint64_t node, const char *format, unsigned number) {
    uint8_t *p = list + (size_t)i * ENTRY;
    char name[32];
    put_entry(p, node);
    put64(p + ENTRY_OUT, node);
    put64(p + ENTRY_OUT + 8, i + 1);
    put32(p + ENTRY_OUT + 16, NAME_LEN);
    put32(p + ENTRY_OUT + 20, is_dir(node) ? 4 : 8);
    snprintf(name, sizeof name, format, number);
    memcpy(p + ENTRY_OUT + DIRENT, name, NAME_LEN);
}

static void make_tree(const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0) die("%s: %s", path, strerror(errno));
    file_size = (uint64_t)st.st_size / n_files;
    if (file_size < SMALL) die("%s is too small for %u files", path, n_files);
    data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (data == MAP_FAILED) die("%s: %s", path, strerror(errno));
    close(fd);
    root_list = malloc((size_t)(n_files + n_dirs) * ENTRY);
    dir_list = malloc((size_t)n_names * ENTRY);
    if (!root_list || !dir_list) die("no memory");
    for (unsigned i = 0; i < n_files; i++) put_dirent(root_list, i, FIRST_FILE + i, "large%03u", i);
    for (unsigned i = 0; i < n_dirs; i++) put_dirent(root_list, n_files + i, first_dir() + i, "dir%05u", i);
    for (unsigned i = 0; i < n_names; i++) put_dirent(dir_list, i, small_file(), "file%04u", i);
}

/* --- guest memory --------------------------------------------------------------------------------------------- */

struct region { uint64_t gpa, size, user; uint8_t *map; void *base; size_t mapped; };

static struct region regions[MAX_REGIONS];
static unsigned n_regions;

/* LEN bytes at a guest-physical address, or NULL where they are not all in one region. */
static uint8_t *at_gpa(uint64_t gpa, uint64_t len) {
    static _Thread_local unsigned last;
    for (unsigned n = 0; n < n_regions; n++) {
        const struct region *r = &regions[(last + n) % n_regions];
        if (gpa >= r->gpa && gpa - r->gpa < r->size && len <= r->size - (gpa - r->gpa)) {
            last = (last + n) % n_regions;
            return r->map + (gpa - r->gpa);
        }
    }
    return NULL;
}

/* The same for an address of the front-end's process, as rings have. */
static void *at_user(uint64_t user, uint64_t len) {
    for (const struct region *r = regions; r < regions + n_regions; r++)
        if (user >= r->user && user - r->user < r->size && len <= r->size - (user - r->user))
            return r->map + (user - r->user);
    return NULL;
}

static void add_region(const uint8_t *p, int fd) {
    struct region r = { .gpa = get64(p), .size = get64(p + 8), .user = get64(p + 16) };
    uint64_t offset = get64(p + 24);
    if (n_regions == MAX_REGIONS || fd < 0) die("a memory region too many, or without a file");
    r.mapped = (size_t)(offset + r.size);
    r.base = mmap(NULL, r.mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (r.base == MAP_FAILED) die("memory: %s", strerror(errno));
    r.map = (uint8_t *)r.base + offset;
    regions[n_regions++] = r;
}

static void drop_region(unsigned i) {
    munmap(regions[i].base, regions[i].mapped);
    regions[i] = regions[--n_regions];
}

/* --- rings ---------------------------------------------------------------------------------------------------- */

struct desc { uint64_t gpa; uint32_t len; uint16_t flags, next; };
struct used_elem { uint32_t id, len; };
enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

struct ring {
    unsigned num;
    uint64_t addresses[3];                   /* of descriptors, used and available ring */
    struct desc *desc;
    uint16_t *avail;                         /* flags, idx, ring[num], used_event */
    uint16_t *used;                          /* flags, idx, elements, avail_event */
    uint16_t last_avail, published, pending;
    int kick, call, epoll;
    bool enabled, running;
    atomic_bool stop;
    pthread_t thread;
};

static struct ring rings[MAX_QUEUES];
static bool event_idx;

struct piece { uint8_t *at; uint32_t len; };
struct chain {
    uint8_t request[IN_HEADER + MAX_ARGUMENTS];
    size_t request_len;
    struct piece out[MAX_CHAIN];
    unsigned n_out, piece;
    uint32_t used, in_piece;                 /* bytes written in all, and in the current piece */
};

/* Collects what a chain has; false when it is none. */
static bool parse(const struct ring *ring, uint16_t head, struct chain *c) {
    const struct desc *table = ring->desc;
    unsigned size = ring->num, i = head, seen = 0;
    c->request_len = c->n_out = c->piece = c->used = c->in_piece = 0;
    for (;;) {
        if (i >= size || seen++ == MAX_CHAIN) return false;
        struct desc d = table[i];
        if (d.flags & INDIRECT) {
            if (table != ring->desc || d.len % sizeof d || !(table = (void *)at_gpa(d.gpa, d.len))) return false;
            size = d.len / sizeof d;
            i = 0;
            continue;
        }
        uint8_t *at = at_gpa(d.gpa, d.len);
        if (!at) return false;
        if (d.flags & WRITE) {
            c->out[c->n_out++] = (struct piece){ at, d.len };
        } else {
            size_t room = sizeof c->request - c->request_len, n = d.len < room ? d.len : room;
            memcpy(c->request + c->request_len, at, n);
            c->request_len += n;
        }
        if (!(d.flags & NEXT)) return c->request_len >= IN_HEADER;
        i = d.next;
    }
}

/* Appends to the answer as much as there is room for. */
static void put(struct chain *c, const void *from, size_t len) {
    const uint8_t *p = from;
    while (len && c->piece < c->n_out) {
        struct piece out = c->out[c->piece];
        uint32_t room = out.len - c->in_piece, n = len < room ? (uint32_t)len : room;
        memcpy(out.at + c->in_piece, p, n);
        p += n;
        len -= n;
        c->used += n;
        c->in_piece += n;
        if (c->in_piece == out.len) {
            c->piece++;
            c->in_piece = 0;
        }
    }
}

static size_t room_for_body(const struct chain *c) {
    size_t room = 0;
    for (unsigned i = 0; i < c->n_out; i++) room += c->out[i].len;
    return room < OUT_HEADER ? 0 : room - OUT_HEADER;
}

/* An answer of an error (0 or negative) and a body, which fits or is refused. */
static void reply(struct chain *c, int error, const void *body, size_t len) {
    uint8_t header[OUT_HEADER];
    if (len > room_for_body(c)) {
        error = -EIO;
        len = 0;
    }
    put32(header, (uint32_t)(OUT_HEADER + len));
    put32(header + 4, (uint32_t)error);
    memcpy(header + 8, c->request + 8, 8);
    put(c, header, sizeof header);
    put(c, body, len);
}

static uint64_t number_at(const char *digits) { return strtoull(digits, NULL, 10); }

static void do_lookup(struct chain *c) {
    const char *name = (const char *)c->request + IN_HEADER;
    size_t len = strnlen(name, c->request_len - IN_HEADER);
    uint8_t entry[ENTRY_OUT];
    uint64_t node = small_file();
    if (len == c->request_len - IN_HEADER) return reply(c, -EINVAL, NULL, 0);
    if (!strncmp(name, "absent", 6)) return reply(c, -ENOENT, NULL, 0);
    if (!strncmp(name, "large", 5) && number_at(name + 5) < n_files) node = FIRST_FILE + number_at(name + 5);
    else if (!strncmp(name, "dir", 3) && number_at(name + 3) < n_dirs) node = first_dir() + number_at(name + 3);
    put_entry(entry, node);
    reply(c, 0, entry, sizeof entry);
}

static void do_read(struct chain *c, uint64_t node) {
    uint64_t offset = get64(c->request + IN_HEADER + 8), len = get32(c->request + IN_HEADER + 16);
    uint64_t size = is_large(node) ? file_size : SMALL;
    const uint8_t *from = data + (is_large(node) ? (node - FIRST_FILE) * file_size : 0);
    if (is_dir(node)) return reply(c, -EISDIR, NULL, 0);
    if (offset >= size) return reply(c, 0, NULL, 0);
    reply(c, 0, from + offset, len < size - offset ? len : size - offset);
}

static void do_readdirplus(struct chain *c, uint64_t node) {
    uint64_t offset = get64(c->request + IN_HEADER + 8), most = get32(c->request + IN_HEADER + 16) / ENTRY;
    uint64_t n = node == ROOT ? n_files + n_dirs : n_names;
    if (!is_dir(node)) return reply(c, -ENOTDIR, NULL, 0);
    if (offset >= n) return reply(c, 0, NULL, 0);
    if (most > n - offset) most = n - offset;
    reply(c, most ? 0 : -EINVAL, (node == ROOT ? root_list : dir_list) + offset * ENTRY, most * ENTRY);
}

static void do_init(struct chain *c) {
    uint8_t out[64] = { 0 };
    /* ASYNC_READ, BIG_WRITES, DO_READDIRPLUS, READDIRPLUS_AUTO, PARALLEL_DIROPS, MAX_PAGES, of what is offered. */
    uint32_t flags = 1u << 0 | 1u << 5 | 1u << 13 | 1u << 14 | 1u << 18 | 1u << 22;
    put32(out, 7);
    put32(out + 4, 31);
    put32(out + 8, get32(c->request + IN_HEADER + 8));
    put32(out + 12, flags & get32(c->request + IN_HEADER + 12));
    put32(out + 16, 64u | 48u << 16);                                  /* max_background, congestion_threshold */
    put32(out + 20, 1u << 20);                                         /* max_write */
    put32(out + 24, 1);                                                /* time_gran */
    put32(out + 28, 256);                                              /* max_pages */
    reply(c, 0, out, sizeof out);
}

static void answer(struct chain *c) {
    static const uint8_t nothing[16];
    uint32_t opcode = get32(c->request + 4);
    uint64_t node = get64(c->request + 16);
    size_t arguments = c->request_len - IN_HEADER;
    uint8_t attr[ATTR_OUT] = { 0 };
    switch (opcode) {
    case FORGET:
    case BATCH_FORGET:
        return;
    case LOOKUP:
        return do_lookup(c);
    case GETATTR:
        put64(attr, 3600);
        put_attr(attr + 16, node);
        return reply(c, 0, attr, sizeof attr);
    case READ:
        return arguments < 40 ? reply(c, -EINVAL, NULL, 0) : do_read(c, node);
    case READDIRPLUS:
        return arguments < 40 ? reply(c, -EINVAL, NULL, 0) : do_readdirplus(c, node);
    case INIT:
        return arguments < 16 ? reply(c, -EINVAL, NULL, 0) : do_init(c);
    case OPEN:
    case OPENDIR:
        return reply(c, 0, nothing, sizeof nothing);
    case RELEASE:
    case RELEASEDIR:
    case DESTROY:
        return reply(c, 0, NULL, 0);
    default:
        return reply(c, -ENOSYS, NULL, 0);
    }
}

static void full_fence(void) { atomic_thread_fence(memory_order_seq_cst); }

/* Makes what was completed visible, once for all of it, and signals if the driver wants that. */
static void publish(struct ring *ring) {
    if (!ring->pending) return;
    uint16_t old = ring->published, new = (uint16_t)(old + ring->pending);
    __atomic_store_n(&ring->used[1], new, __ATOMIC_RELEASE);
    ring->published = new;
    ring->pending = 0;
    full_fence();
    uint16_t wanted = __atomic_load_n(&ring->avail[2 + ring->num], __ATOMIC_RELAXED);
    bool signal = event_idx ? (uint16_t)(new - wanted - 1) < (uint16_t)(new - old) : !(ring->avail[0] & 1);
    uint64_t one = 1;
    if (!signal || ring->call < 0) return;
    if (write(ring->call, &one, 8) < 0 && errno != EAGAIN) die("call: %s", strerror(errno));
}

static uint16_t avail_idx(const struct ring *ring) { return __atomic_load_n(&ring->avail[1], __ATOMIC_ACQUIRE); }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Whether something came within --poll-us. */
static bool look(const struct ring *ring) {
    if (!poll_us) return false;
    for (int64_t end = now_ns() + INT64_C(1000) * poll_us; now_ns() < end;)
        for (int i = 0; i < 64; i++) {
            if (avail_idx(ring) != ring->last_avail || ring->stop) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    return false;
}

static void *serve(void *argument) {
    struct ring *ring = argument;
    struct used_elem *elements = (void *)(ring->used + 2);
    uint16_t *avail_event = ring->used + 2 + 4 * ring->num;
    struct chain *c = malloc(sizeof *c);
    if (!c) die("no memory");
    while (!ring->stop) {
        uint16_t end = avail_idx(ring);
        for (; ring->last_avail != end; ring->last_avail++) {
            uint16_t head = ring->avail[2 + ring->last_avail % ring->num];
            if (parse(ring, head, c)) answer(c);
            uint16_t at = (uint16_t)(ring->published + ring->pending++) % ring->num;
            elements[at] = (struct used_elem){ head, c->used };
        }
        publish(ring);
        if (look(ring)) continue;
        if (event_idx) __atomic_store_n(avail_event, ring->last_avail, __ATOMIC_RELAXED);
        full_fence();
        struct epoll_event event;
        /* The kick is never read: an edge tells of each signal, and that saves a system call for each wake-up. */
        if (avail_idx(ring) == ring->last_avail && !ring->stop) epoll_wait(ring->epoll, &event, 1, -1);
    }
    free(c);
    return NULL;
}

static void stop_ring(struct ring *ring) {
    uint64_t one = 1;
    if (!ring->running) return;
    ring->stop = true;
    if (write(ring->kick, &one, 8) < 0) die("kick: %s", strerror(errno));
    pthread_join(ring->thread, NULL);
    close(ring->epoll);
    ring->running = false;
}

static void start_ring(struct ring *ring) {
    uint64_t n = ring->num;
    if (ring->running || !ring->enabled || ring->kick < 0 || !n) return;
    ring->desc = at_user(ring->addresses[0], 16 * n);
    ring->used = at_user(ring->addresses[1], 6 + 8 * n);
    ring->avail = at_user(ring->addresses[2], 6 + 2 * n);
    if (!ring->desc || !ring->used || !ring->avail) return;
    ring->published = ring->used[1];
    ring->pending = 0;
    ring->stop = false;
    struct epoll_event event = { .events = EPOLLIN | EPOLLET };
    ring->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (ring->epoll < 0 || epoll_ctl(ring->epoll, EPOLL_CTL_ADD, ring->kick, &event) < 0)
        die("epoll: %s", strerror(errno));
    if (pthread_create(&ring->thread, NULL, serve, ring)) die("no thread");
    ring->running = true;
}

/* Nobody uses the memory while it changes. */
static void stop_all(void) { for (struct ring *r = rings; r < rings + MAX_QUEUES; r++) stop_ring(r); }
static void start_all(void) { for (struct ring *r = rings; r < rings + MAX_QUEUES; r++) start_ring(r); }

/* --- vhost-user messages -------------------------------------------------------------------------------------- */

enum { GET_FEATURES = 1, SET_FEATURES = 2, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
       SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13,
       GET_PROTOCOL_FEATURES = 15, GET_QUEUE_NUM = 17, SET_VRING_ENABLE = 18, RESET_DEVICE = 34,
       GET_MAX_MEM_SLOTS = 36, ADD_MEM_REG = 37, REM_MEM_REG = 38 };
enum { VERSION = 1, REPLY = 4, NEED_REPLY = 8 };

/* INDIRECT_DESC, EVENT_IDX, VHOST_USER_F_PROTOCOL_FEATURES, VERSION_1. */
static const uint64_t FEATURES = UINT64_C(1) << 28 | UINT64_C(1) << 29 | UINT64_C(1) << 30 | UINT64_C(1) << 32;
/* MQ, REPLY_ACK, RESET_DEVICE, CONFIGURE_MEM_SLOTS. */
static const uint64_t PROTOCOL = 1 << 0 | 1 << 3 | 1 << 13 | 1 << 15;

struct message { uint32_t request, flags, size; uint8_t payload[4096]; int fds[MAX_FDS]; unsigned n_fds; };

static bool receive(int socket, struct message *m) {
    struct iovec iov = { m, 12 };
    union { char buf[CMSG_SPACE(sizeof(int) * MAX_FDS)]; struct cmsghdr align; } control;
    struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
    header.msg_control = &control;
    header.msg_controllen = sizeof control;
    m->n_fds = 0;
    if (recvmsg(socket, &header, MSG_WAITALL | MSG_CMSG_CLOEXEC) != 12) return false;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            m->n_fds = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(m->fds, CMSG_DATA(c), m->n_fds * sizeof(int));
        }
    memset(m->payload, 0, sizeof m->payload);
    if (m->size > sizeof m->payload) return false;
    return !m->size || recv(socket, m->payload, m->size, MSG_WAITALL) == (ssize_t)m->size;
}

static void respond(int socket, struct message *m, const void *payload, uint32_t size) {
    m->flags = VERSION | REPLY;
    m->size = size;
    memcpy(m->payload, payload, size);
    if (send(socket, m, 12 + size, MSG_NOSIGNAL) != (ssize_t)(12 + size)) die("the front-end does not listen");
}

static void respond64(int socket, struct message *m, uint64_t value) { respond(socket, m, &value, 8); }

/* The ring that a message is about: by its index, or as kick and call tell it, in the lowest byte. */
static struct ring *ring_of(const struct message *m) {
    bool in_byte = m->request == SET_VRING_KICK || m->request == SET_VRING_CALL;
    uint32_t index = get32(m->payload) & (in_byte ? 0xff : UINT32_MAX);
    if (index >= MAX_QUEUES) die("message %u for ring %u", m->request, index);
    return &rings[index];
}

static void replace_fd(int *fd, struct message *m) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
    if (m->n_fds) {
        *fd = m->fds[0];
        m->fds[0] = -1;
    }
}

static void set_memory(const struct message *m) {
    unsigned n = get32(m->payload);
    if (n > MAX_FDS || n != m->n_fds) die("a memory table of %u regions with %u files", n, m->n_fds);
    while (n_regions) drop_region(0);
    for (unsigned i = 0; i < n; i++) add_region(m->payload + 8 + 32 * i, m->fds[i]);
}

static void forget_region(const struct message *m) {
    for (unsigned i = 0; i < n_regions; i++)
        if (regions[i].gpa == get64(m->payload + 8)) return drop_region(i);
}

/* Returns whether the message has been answered. */
static bool handle(int socket, struct message *m) {
    struct ring *ring;
    switch (m->request) {
    case GET_FEATURES:
        respond64(socket, m, FEATURES);
        return true;
    case GET_PROTOCOL_FEATURES:
        respond64(socket, m, PROTOCOL);
        return true;
    case GET_QUEUE_NUM:
        respond64(socket, m, n_queues + 1);
        return true;
    case GET_MAX_MEM_SLOTS:
        respond64(socket, m, MAX_REGIONS);
        return true;
    case SET_FEATURES:
        event_idx = get64(m->payload) >> 29 & 1;
        if (!(get64(m->payload) >> 30 & 1))
            for (ring = rings; ring < rings + MAX_QUEUES; ring++) ring->enabled = true;
        return false;
    case SET_MEM_TABLE:
    case ADD_MEM_REG:
    case REM_MEM_REG:
        stop_all();
        if (m->request == SET_MEM_TABLE) set_memory(m);
        else if (m->request == ADD_MEM_REG) add_region(m->payload + 8, m->n_fds ? m->fds[0] : -1);
        else forget_region(m);
        start_all();
        return false;
    case RESET_DEVICE:
        stop_all();
        for (ring = rings; ring < rings + MAX_QUEUES; ring++) ring->enabled = false;
        return false;
    case GET_VRING_BASE:
        ring = ring_of(m);
        stop_ring(ring);
        replace_fd(&ring->kick, m);
        respond64(socket, m, (uint64_t)ring->last_avail << 32 | (uint64_t)(ring - rings));
        return true;
    case SET_VRING_NUM:
    case SET_VRING_ADDR:
    case SET_VRING_BASE:
    case SET_VRING_KICK:
    case SET_VRING_CALL:
    case SET_VRING_ENABLE:
        ring = ring_of(m);
        stop_ring(ring);
        if (m->request == SET_VRING_NUM) ring->num = get32(m->payload + 4) <= 32768 ? get32(m->payload + 4) : 0;
        if (m->request == SET_VRING_ADDR) memcpy(ring->addresses, m->payload + 8, sizeof ring->addresses);
        if (m->request == SET_VRING_BASE) ring->last_avail = (uint16_t)get32(m->payload + 4);
        if (m->request == SET_VRING_KICK) replace_fd(&ring->kick, m);
        if (m->request == SET_VRING_CALL) replace_fd(&ring->call, m);
        if (m->request == SET_VRING_ENABLE) ring->enabled = get32(m->payload + 4);
        start_ring(ring);
        return false;
    default:
        return false;   /* SET_OWNER and what else needs nothing done */
    }
}

static int listen_on(const char *path) {
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof address.sun_path) die("the socket's path is too long");
    strcpy(address.sun_path, path);
    unlink(path);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1) < 0)
        die("%s: %s", path, strerror(errno));
    int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
    if (connection < 0) die("accept: %s", strerror(errno));
    close(fd);
    return connection;
}

static unsigned number(const char *name, const char *text, unsigned least, unsigned most) {
    char *end;
    unsigned long value = text ? strtoul(text, &end, 10) : 0;
    if (!text || *end || value < least || value > most) die("%s takes a number from %u to %u", name, least, most);
    return (unsigned)value;
}

int main(int argc, char **argv) {
    const char *path = NULL, *file = NULL;
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--socket")) path = value;
        else if (!strcmp(name, "--data")) file = value;
        else if (!strcmp(name, "--files")) n_files = number(name, value, 1, 1000);
        else if (!strcmp(name, "--dirs")) n_dirs = number(name, value, 0, 99999);
        else if (!strcmp(name, "--names")) n_names = number(name, value, 1, 9999);
        else if (!strcmp(name, "--queues")) n_queues = number(name, value, 1, MAX_QUEUES - 1);
        else if (!strcmp(name, "--poll-us")) poll_us = number(name, value, 0, 1000000);
        else die("unknown argument %s", name);
    }
    if (!path || !file) die("--socket and --data are needed; the head of floor.c tells the rest");
    make_tree(file);
    for (struct ring *ring = rings; ring < rings + MAX_QUEUES; ring++) ring->kick = ring->call = -1;
    struct message m;
    for (int connection = listen_on(path); receive(connection, &m);) {
        bool wants_reply = m.flags & NEED_REPLY;
        if (!handle(connection, &m) && wants_reply) respond64(connection, &m, 0);
        /* What nobody keeps: an error eventfd, files of memory that is mapped by now. */
        for (unsigned i = 0; i < m.n_fds; i++)
            if (m.fds[i] >= 0) close(m.fds[i]);
    }
    stop_all();
    return 0;
}
