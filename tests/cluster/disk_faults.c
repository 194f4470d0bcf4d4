/* Counts the operations of a process that change files below some folders, and lets one of them fail (LD_PRELOAD).

   cc -shared -fPIC -o disk_faults.so disk_faults.c -ldl

   Counted are open for writing, write, fsync, ftruncate, rename, link and mkdir, of paths that begin with one that
   `arm` was given, and of descriptors that were opened by such a path. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { NONE, FULL, BROKEN, KILLED }; /* from the point on ENOSPC; once EIO; SIGKILL before it */

static char watched[4096];
static char is_watched[65536]; /* by descriptor */
static atomic_long count;
static long point;
static int kind;

void arm(int fault, long at, const char *folder) {
  strncpy(watched, folder, sizeof watched - 1);
  kind = fault, point = at, count = 0;
}

long counted(void) { return count; }

static int under(const char *path) { return watched[0] && path && strncmp(path, watched, strlen(watched)) == 0; }

/* Whether this operation fails; errno is set then. */
static int fails(void) {
  long number = ++count;
  if (kind == KILLED && number == point) kill(getpid(), SIGKILL);
  if (kind == FULL && number >= point) return errno = ENOSPC;
  if (kind == BROKEN && number == point) return errno = EIO;
  return 0;
}

#define REAL(name) static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name)

static int opened(int descriptor, int is_counted) {
  if (descriptor >= 0 && descriptor < (int)sizeof is_watched) is_watched[descriptor] = is_counted;
  return descriptor;
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define IS_COUNTED int is_counted = under(path) && (flags & (O_WRONLY | O_RDWR)); if (is_counted && fails()) return -1

int open(const char *path, int flags, ...) { MODE; IS_COUNTED; REAL(open); return opened(real(path, flags, mode), is_counted); }
int open64(const char *path, int flags, ...) { MODE; IS_COUNTED; REAL(open64); return opened(real(path, flags, mode), is_counted); }
int openat(int d, const char *path, int flags, ...) { MODE; IS_COUNTED; REAL(openat); return opened(real(d, path, flags, mode), is_counted); }
int openat64(int d, const char *path, int flags, ...) { MODE; IS_COUNTED; REAL(openat64); return opened(real(d, path, flags, mode), is_counted); }

#define COUNT_FD(d) if ((d) >= 0 && (d) < (int)sizeof is_watched && is_watched[d] && fails()) return -1

ssize_t write(int d, const void *data, size_t n) { COUNT_FD(d); REAL(write); return real(d, data, n); }
ssize_t pwrite64(int d, const void *data, size_t n, off64_t at) { COUNT_FD(d); REAL(pwrite64); return real(d, data, n, at); }
ssize_t writev(int d, const struct iovec *data, int n) { COUNT_FD(d); REAL(writev); return real(d, data, n); }
int ftruncate64(int d, off64_t size) { COUNT_FD(d); REAL(ftruncate64); return real(d, size); }
int fdatasync(int d) { COUNT_FD(d); REAL(fdatasync); return real(d); }

int fsync(int d) { /* also of folders, which are opened for reading */
  char link[64], path[4096];
  REAL(fsync);
  strcpy(link, "/proc/self/fd/");
  char digits[16];
  int n = 0, rest = d;
  do digits[n++] = '0' + rest % 10; while (rest /= 10);
  size_t end = strlen(link);
  while (n) link[end++] = digits[--n];
  link[end] = 0;
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length > 0) {
    path[length] = 0;
    if (under(path) && fails()) return -1;
  }
  return real(d);
}

int close(int d) { if (d >= 0 && d < (int)sizeof is_watched) is_watched[d] = 0; REAL(close); return real(d); }

int rename(const char *old, const char *new) { if (under(new) && fails()) return -1; REAL(rename); return real(old, new); }
int renameat(int a, const char *old, int b, const char *new) { if (under(new) && fails()) return -1; REAL(renameat); return real(a, old, b, new); }
int link(const char *old, const char *new) { if (under(new) && fails()) return -1; REAL(link); return real(old, new); }
int linkat(int a, const char *old, int b, const char *new, int flags) { if (under(new) && fails()) return -1; REAL(linkat); return real(a, old, b, new, flags); }
int mkdir(const char *path, mode_t mode) { if (under(path) && fails()) return -1; REAL(mkdir); return real(path, mode); }
int mkdirat(int d, const char *path, mode_t mode) { if (under(path) && fails()) return -1; REAL(mkdirat); return real(d, path, mode); }
