/* Preloaded into a process, tells what it does to the files of one folder.
 *
 * Before each call that changes something under $WATCHED (and before each fsync there) it appends a line to $WATCH_LOG,
 * `NUMBER CALL PATH [NEW PATH]`, and, if $WATCH_SNAPSHOTS is set, copies the folder to $WATCH_SNAPSHOTS/NUMBER: what a
 * SIGKILL at this moment would leave. After `watch_fail(n, error)` the n-th of these calls from now fails with this
 * errno, and so do all later ones that need room (a disk that is full stays full); `watch_fail(0, 0)` ends that.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static __thread int has_turn = 0; /* from the note of a call to its end: snapshots see no half of another */
static int number = 0, first_failure = 0, failure = 0;

void watch_fail(int calls, int error) {
    pthread_mutex_lock(&turn);
    first_failure = calls ? number + calls : 0;
    failure = error;
    pthread_mutex_unlock(&turn);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char *path_of(int folder, const char *path, char *held) {
    if (path[0] == '/') return path;
    char link[64];
    if (folder == AT_FDCWD) {
        if (!getcwd(held, PATH_MAX)) return path;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, held, PATH_MAX - 1);
        if (n < 0) return path;
        held[n] = 0;
    }
    if (path[0]) {
        strncat(held, "/", PATH_MAX - strlen(held) - 1);
        strncat(held, path, PATH_MAX - strlen(held) - 1);
    }
    return held;
}

static int is_watched(const char *path) {
    const char *root = getenv("WATCHED");
    size_t n = root ? strlen(root) : 0;
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

/* Notes a call; whether it is to fail, with errno set. */
static int fails(const char *call, const char *path, const char *new_path, int needs_room) {
    if (!is_watched(path) && !(new_path && is_watched(new_path))) return 0;
    pthread_mutex_lock(&turn);
    number++;
    const char *log = getenv("WATCH_LOG"), *snapshots = getenv("WATCH_SNAPSHOTS");
    if (log) {
        char line[3 * PATH_MAX];
        int n = snprintf(line, sizeof line, "%d\t%s\t%s\t%s\n", number, call, path, new_path ? new_path : "");
        int file = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (file >= 0) {
            if (REAL(write)(file, line, n) != n) abort();
            close(file);
        }
    }
    if (snapshots) {
        char target[PATH_MAX];
        snprintf(target, sizeof target, "%s/%d", snapshots, number);
        char *arguments[] = {"cp", "-a", getenv("WATCHED"), target, NULL};
        char *environment[] = {"PATH=/bin:/usr/bin", NULL};
        pid_t child;
        int status;
        if (posix_spawnp(&child, "cp", NULL, NULL, arguments, environment)) abort();
        if (waitpid(child, &status, 0) != child || status) abort();
    }
    int failed = first_failure && (number == first_failure || (number > first_failure && needs_room));
    if (failed) errno = failure;
    has_turn = !failed;
    if (failed) pthread_mutex_unlock(&turn);
    return failed;
}

static void finish(void) {
    if (has_turn) pthread_mutex_unlock(&turn);
    has_turn = 0;
}

#define OF_DESCRIPTOR(call, descriptor, needs_room, failure)                                            \
    do {                                                                                                \
        int kept = errno;                                                                               \
        char held[PATH_MAX];                                                                            \
        if (descriptor > 2 && fails(call, path_of(descriptor, "", held), NULL, needs_room)) return failure; \
        errno = kept;                                                                                   \
    } while (0)

#define OF_PATHS(call, folder, path, new_folder, new_path, needs_room)                                 \
    do {                                                                                               \
        int kept = errno;                                                                              \
        char held[PATH_MAX], new_held[PATH_MAX];                                                       \
        const char *first = path_of(folder, path, held), *second = new_path;                           \
        if (fails(call, first, second ? path_of(new_folder, second, new_held) : NULL, needs_room)) return -1; \
        errno = kept;                                                                                  \
    } while (0)

#define OPEN(name, parameters, folder, arguments)                                     \
    int name parameters {                                                             \
        mode_t mode = 0;                                                              \
        if (flags & (O_CREAT | O_TMPFILE)) {                                          \
            va_list rest;                                                             \
            va_start(rest, flags);                                                    \
            mode = va_arg(rest, mode_t);                                              \
            va_end(rest);                                                             \
        }                                                                             \
        if (flags & (O_CREAT | O_TRUNC)) OF_PATHS("open", folder, path, AT_FDCWD, NULL, 1); \
        int result = REAL(name) arguments;                                            \
        finish();                                                                     \
        return result;                                                                \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), folder, (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), folder, (folder, path, flags, mode))

#define ON_DESCRIPTOR(type, name, needs_room, parameters, arguments) \
    type name parameters {                                           \
        OF_DESCRIPTOR(#name, file, needs_room, -1);                  \
        type result = REAL(name) arguments;                          \
        finish();                                                    \
        return result;                                               \
    }
ON_DESCRIPTOR(ssize_t, write, 1, (int file, const void *data, size_t n), (file, data, n))
ON_DESCRIPTOR(ssize_t, pwrite, 1, (int file, const void *data, size_t n, off_t at), (file, data, n, at))
ON_DESCRIPTOR(ssize_t, pwrite64, 1, (int file, const void *data, size_t n, off64_t at), (file, data, n, at))
ON_DESCRIPTOR(ssize_t, writev, 1, (int file, const struct iovec *data, int n), (file, data, n))
ON_DESCRIPTOR(ssize_t, pwritev, 1, (int file, const struct iovec *data, int n, off_t at), (file, data, n, at))
ON_DESCRIPTOR(int, ftruncate, 0, (int file, off_t n), (file, n))
ON_DESCRIPTOR(int, ftruncate64, 0, (int file, off64_t n), (file, n))
ON_DESCRIPTOR(int, fsync, 1, (int file), (file))
ON_DESCRIPTOR(int, fdatasync, 1, (int file), (file))

#define ON_PATHS(name, needs_room, parameters, folder, path, new_folder, new_path, arguments) \
    int name parameters {                                                                     \
        OF_PATHS(#name, folder, path, new_folder, new_path, needs_room);                      \
        int result = REAL(name) arguments;                                                    \
        finish();                                                                             \
        return result;                                                                        \
    }
ON_PATHS(mkdir, 1, (const char *path, mode_t mode), AT_FDCWD, path, AT_FDCWD, NULL, (path, mode))
ON_PATHS(mkdirat, 1, (int folder, const char *path, mode_t mode), folder, path, AT_FDCWD, NULL, (folder, path, mode))
ON_PATHS(rmdir, 0, (const char *path), AT_FDCWD, path, AT_FDCWD, NULL, (path))
ON_PATHS(unlink, 0, (const char *path), AT_FDCWD, path, AT_FDCWD, NULL, (path))
ON_PATHS(unlinkat, 0, (int folder, const char *path, int flags), folder, path, AT_FDCWD, NULL, (folder, path, flags))
ON_PATHS(rename, 0, (const char *path, const char *to), AT_FDCWD, path, AT_FDCWD, to, (path, to))
ON_PATHS(renameat, 0, (int a, const char *path, int b, const char *to), a, path, b, to, (a, path, b, to))
ON_PATHS(link, 1, (const char *path, const char *to), AT_FDCWD, path, AT_FDCWD, to, (path, to))
ON_PATHS(truncate, 0, (const char *path, off_t n), AT_FDCWD, path, AT_FDCWD, NULL, (path, n))
