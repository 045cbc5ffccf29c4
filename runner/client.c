//go:build linux && cgo

/*
 * The smallest part of pgark wal push and pgark wal fetch, which PostgreSQL starts once a segment and waits for: it asks
 * whoever listens on the socket, and ends with the answer. That takes 1 ms. To get as far as main, Go takes thirty: it
 * maps its heap, starts its threads and initialises the packages of an S3 client.
 *
 * It runs as a constructor, so before Go does anything. Whatever is not the usual thing, it leaves alone: it puts
 * everything back as it found it and returns, Go starts, and walPush or newWALFetchCommand (wal.go) does the whole thing
 * anew, with patience for a runner that is being started, with hints and with help. So nothing here may have an effect
 * that asking again would repeat: a file that is stored already is stored, and one that a fetcher has handed over can be
 * had again.
 *
 * What it says and how it exits are those of wal.go. What it asks and reads is the plain form of the package control.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Only the GNU C library gives a constructor the arguments of the program. */
#ifdef __GLIBC__

/* pushTimeout of internal/engine/wal, in seconds. */
#define PUSH_TIMEOUT 120

/* text is a string that is put together in a bounded buffer. */
struct text {
	size_t n;
	bool full;
	char b[PATH_MAX + 256];
};

static void add(struct text *t, const char *s, size_t n)
{
	if (t->full || n >= sizeof t->b - t->n) {
		t->full = true;
		return;
	}
	memcpy(t->b + t->n, s, n);
	t->n += n;
	t->b[t->n] = 0;
}

static void adds(struct text *t, const char *s)
{
	add(t, s, strlen(s));
}

/* harmless tells whether s means in JSON what it means here. */
static bool harmless(const char *s)
{
	for (; *s; s++)
		if (*s < ' ' || *s > '~' || *s == '"' || *s == '\\')
			return false;
	return true;
}

/* clean tells whether a path is as Go's filepath.Clean would make it: no empty element, no . and no .. */
static bool clean(const char *path)
{
	const char *s = path;
	if (*s == '/')
		s++;
	for (;;) {
		size_t n = strcspn(s, "/");
		if (n == 0 || (n == 1 && s[0] == '.') || (n == 2 && s[0] == '.' && s[1] == '.'))
			return false;
		if (s[n] == 0)
			return harmless(path);
		s += n + 1;
	}
}

static bool is_element(const char *s)
{
	return *s && !strchr(s, '/') && clean(s);
}

static void complain(const char *s, size_t n)
{
	struct iovec parts[] = {{"pgark: ", 7}, {(void *)s, n}, {"\n", 1}};
	ssize_t written = writev(STDERR_FILENO, parts, 3);
	(void)written; /* there is nowhere to say that it could not be said */
}

/*
 * ask sends the request to a socket and reads the line that comes back, without its end, into line. It returns -1 on
 * anything but one whole line, with errno ETIMEDOUT where there was none within the seconds given (0: no limit).
 */
static ssize_t ask(const char *name, const struct text *request, char *line, size_t size, int seconds)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (request->full || strlen(name) >= sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, name);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	ssize_t n = -1;
	int why = EPROTO;
	if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
	    send(fd, request->b, request->n, MSG_NOSIGNAL) != (ssize_t)request->n) {
		why = errno;
		goto out;
	}
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	const time_t end = now.tv_sec + seconds;
	for (size_t got = 0; got < size;) {
		int wait = -1;
		if (seconds) {
			clock_gettime(CLOCK_MONOTONIC, &now);
			wait = now.tv_sec < end ? (int)(end - now.tv_sec) * 1000 : 0;
		}
		struct pollfd p = {.fd = fd, .events = POLLIN};
		int ready = poll(&p, 1, wait);
		if (ready < 0 && errno == EINTR)
			continue;
		if (ready <= 0) {
			why = ready ? errno : ETIMEDOUT;
			goto out;
		}
		ssize_t more = recv(fd, line + got, size - got, 0);
		if (more < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (more <= 0) {
			why = more ? errno : ECONNRESET;
			goto out;
		}
		char *newline = memchr(line + got, '\n', (size_t)more);
		if (newline) {
			*newline = 0;
			n = newline - line;
			goto out;
		}
		got += (size_t)more;
	}
out:
	close(fd);
	errno = why;
	return n;
}

/* find_root appends the root of the layout, as job.FindLayout finds it. */
static bool find_root(struct text *to)
{
	static const char lib[] = "/usr/local/lib/pgark/";
	const char *root = getenv("PGARK_ROOT");
	if (root && *root) {
		if (!clean(root))
			return false;
		if (*root != '/')
			adds(to, "/");
		adds(to, root);
		return true;
	}
	char exe[PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
	if (n <= 0 || exe[0] != '/')
		return false;
	exe[n] = 0;
	if (access(exe, F_OK) < 0) /* it was removed, or is not to be found under this name */
		return false;
	char *last = NULL;
	for (char *at = exe; (at = strstr(at, lib)); at++)
		last = at;
	if (last)
		add(to, exe, (size_t)(last - exe));
	return true;
}

/* option tells whether argument *i is --name VALUE or --name=VALUE, takes the value and moves *i to the last argument of it. */
static bool option(int argc, char **argv, int *i, const char *name, const char **value)
{
	const char *a = argv[*i];
	size_t n = strlen(name);
	if (strncmp(a, "--", 2) != 0 || strncmp(a + 2, name, n) != 0)
		return false;
	if (a[2 + n] == '=') {
		*value = a + 2 + n + 1;
		return true;
	}
	if (a[2 + n] != 0 || *i + 1 >= argc)
		return false;
	*value = argv[++*i];
	return true;
}

/* What is said when a push is interrupted, ready for the handler. */
static struct text interrupted;

static void on_interrupt(int signal_number)
{
	(void)signal_number;
	complain(interrupted.b, interrupted.n);
	_exit(1);
}

static void push(int argc, char **argv)
{
	const char *job = NULL, *instance = NULL, *path = NULL;
	for (int i = 3; i < argc; i++) {
		if (option(argc, argv, &i, "job", &job) || option(argc, argv, &i, "instance", &instance))
			continue;
		if (path || argv[i][0] == '-')
			return;
		path = argv[i];
	}
	if (!job || !instance || !path || !is_element(job) || !is_element(instance) || !clean(path))
		return;

	static struct text name, request;
	if (!find_root(&name))
		return;
	adds(&name, "/run/pgark/");
	adds(&name, job);
	adds(&name, "/");
	adds(&name, instance);
	adds(&name, ".sock");
	adds(&request, "{\"op\":\"push\",\"path\":\"");
	if (path[0] != '/') {
		char directory[PATH_MAX];
		if (!getcwd(directory, sizeof directory) || directory[0] != '/' || !harmless(directory))
			return;
		if (directory[1])
			adds(&request, directory);
		adds(&request, "/");
	}
	adds(&request, path);
	adds(&request, "\",\"plain\":true}\n");
	if (name.full)
		return;

	const char *file = strrchr(path, '/');
	file = file ? file + 1 : path;
	adds(&interrupted, "store wal ");
	adds(&interrupted, file);
	adds(&interrupted, ": interrupted; PostgreSQL keeps the file and asks again");
	/*
	 * Not SIGTERM, as in walPush: PostgreSQL's archiver reads meaning into the death of its command by a signal. A fast
	 * shutdown interrupts the whole process group; that is no reason for the archiver to complain.
	 */
	struct sigaction before, action = {.sa_handler = on_interrupt};
	if (sigaction(SIGINT, &action, &before) < 0)
		return;
	static char line[16 << 10];
	ssize_t n = ask(name.b, &request, line, sizeof line, PUSH_TIMEOUT);
	if (n < 0 && errno == ETIMEDOUT) {
		/* Going on would wait as long again. */
		static struct text late;
		adds(&late, "store wal ");
		adds(&late, file);
		adds(&late, ": ask the runner on ");
		adds(&late, name.b);
		adds(&late, " to push: no answer within 2m0s; PostgreSQL keeps the file and asks again");
		complain(late.b, late.n);
		_exit(1);
	}
	if (n == 2 && memcmp(line, "ok", 2) == 0)
		_exit(0);
	if (n > 3 && memcmp(line, "no ", 3) == 0) {
		complain(line + 3, (size_t)n - 3);
		_exit(1);
	}
	sigaction(SIGINT, &before, NULL);
}

/* fetch_from asks one fetcher, and returns only without an answer. */
static void fetch_from(const char *name, const struct text *request, const char *path)
{
	static char line[16 << 10];
	ssize_t n = ask(name, request, line, sizeof line, 0);
	if (n == 6 && memcmp(line, "absent", 6) == 0)
		_exit(1);
	if (n > 4 && memcmp(line, "ok /", 4) == 0 && rename(line + 3, path) == 0)
		_exit(0);
}

static void fetch(int argc, char **argv)
{
	static const char *const options[] = {"socket", "job", "instance", "repository", "series", "endpoint", "region", "prefetch", "until-lsn", "stop-lsn"};
	const size_t known = sizeof options / sizeof *options;
	const char *socket_name = NULL;
	const int flags = argc - 2;
	uint64_t key = 0xcbf29ce484222325; /* FNV-1a, as detachedRing of internal/engine/wal */
	for (int i = 3; i < flags; i++) {
		if (strcmp(argv[i], "--path-style") == 0)
			continue;
		const char *value = NULL;
		size_t o = 0;
		while (o < known && !option(flags, argv, &i, options[o], &value))
			o++;
		if (o == known)
			return;
		if (o == 0)
			socket_name = value;
	}
	for (int i = 3; i < flags; i++)
		for (const char *s = argv[i];; s++) {
			key = (key ^ (unsigned char)*s) * 0x100000001b3;
			if (!*s)
				break;
		}
	const char *file = argv[argc - 2], *path = argv[argc - 1];
	if (file[0] == '-' || path[0] == '-' || path[0] == 0 || !is_element(file))
		return;

	static struct text request;
	adds(&request, "{\"op\":\"fetch\",\"name\":\"");
	adds(&request, file);
	adds(&request, "\",\"plain\":true}\n");
	if (socket_name)
		fetch_from(socket_name, &request, path);

	/* The fetcher that an earlier call left behind. Its directory may lie in a shared one: it has to be ours. */
	static struct text ring;
	const char *slash = strrchr(path, '/');
	if (slash)
		add(&ring, path, (size_t)(slash - path) + 1);
	char digits[17];
	snprintf(digits, sizeof digits, "%016llx", (unsigned long long)key);
	adds(&ring, ".pgark-fetch-");
	adds(&ring, digits);
	struct stat is;
	if (ring.full || lstat(ring.b, &is) < 0 || !S_ISDIR(is.st_mode) || (is.st_mode & 077) || is.st_uid != geteuid())
		return;
	adds(&ring, "/socket");
	if (!ring.full)
		fetch_from(ring.b, &request, path);
}

__attribute__((constructor)) static void answer(int argc, char **argv)
{
	if (argc < 5 || strcmp(argv[1], "wal") != 0)
		return;
	if (strcmp(argv[2], "push") == 0)
		push(argc, argv);
	else if (strcmp(argv[2], "fetch") == 0)
		fetch(argc, argv);
}

#endif
