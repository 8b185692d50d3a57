// The first process of a guest whose kernel has no virtio-fs built in: loads the modules of the initramfs in the
// order of /modules/order, mounts the root file system that the kernel command line names (root=TAG, rootfstype=,
// rootflags=, ro or rw), and becomes the image's own first process (init=, with the arguments that the kernel hands
// on from behind "--"). guest/initramfs.py packs it. When it ends, the kernel panics: the console has said why.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// How often the root is tried: a device that is found late makes its tag known late. 50 ms apart.
enum { TRIES = 100 };

static void fail(const char *what, const char *name) {
    fprintf(stderr, "rafs-guest: initramfs: %s %s: %s\n", what, name, strerror(errno));
    exit(1);
}

struct words {
    char *root, *type, *flags, *init;
    unsigned long mount;
};

// value - The value of "NAME=VALUE" when `word` begins with `name` ("NAME="), else `old`.
static char *value(char *word, const char *name, char *old) {
    size_t n = strlen(name);
    return strncmp(word, name, n) == 0 ? word + n : old;
}

// read_words - What the kernel command line in `text` (changed in place) says about the root and its first process.
//
// Of a word that is there twice the last counts, as for the kernel. No value of these has blanks in it.
static struct words read_words(char *text) {
    struct words found = {NULL, "virtiofs", "", "/sbin/init", MS_RDONLY};
    char *rest = NULL;
    for (char *word = strtok_r(text, " \n", &rest); word && strcmp(word, "--"); word = strtok_r(NULL, " \n", &rest)) {
        found.root = value(word, "root=", found.root);
        found.type = value(word, "rootfstype=", found.type);
        found.flags = value(word, "rootflags=", found.flags);
        found.init = value(word, "init=", found.init);
        if (strcmp(word, "ro") == 0) found.mount = MS_RDONLY;
        if (strcmp(word, "rw") == 0) found.mount = 0;
    }
    return found;
}

static void load_modules(void) {
    FILE *order = fopen("/modules/order", "re");
    if (!order) fail("cannot read", "/modules/order");
    char name[256];
    while (fscanf(order, "%255s", name) == 1) {
        char path[300];
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)) fail("cannot load", path);
        close(fd);
        // The initramfs is memory that the guest wants back.
        unlink(path);
    }
    fclose(order);
    unlink("/modules/order");
}

static void mount_root(const struct words *words) {
    const struct timespec pause = {0, 50 * 1000 * 1000};
    for (int i = 0; mount(words->root, "/root", words->type, words->mount, words->flags); i++) {
        // No such tag: EINVAL before Linux 6.9, ENOENT since.
        if (i == TRIES || (errno != EINVAL && errno != ENOENT)) fail("cannot mount", words->root);
        nanosleep(&pause, NULL);
    }
}

int main(int argc, char **argv) {
    (void)argc;
    static char text[8192];
    if (mount("proc", "/proc", "proc", 0, NULL)) fail("cannot mount", "/proc");
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (n < 0) fail("cannot read", "/proc/cmdline");
    close(fd);
    umount("/proc");
    struct words words = read_words(text);
    if (!words.root) {
        errno = EINVAL;
        fail("the kernel command line has no", "root=TAG");
    }
    load_modules();
    mount_root(&words);
    unlink("/init");
    // The rootfs cannot be unmounted, so the image is moved over it.
    if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/")) fail("cannot enter", words.root);
    argv[0] = words.init;
    execv(words.init, argv);
    fail("cannot start", words.init);
}
