/* The limit: accept, fork, exec. Nothing that starts a process per connection can do less.
 *
 * usage: limit HOST PORT PROGRAM ARGUMENT...
 * PROGRAM gets the connection as its stdin; its stdout is /dev/null if the first ARGUMENT is --use-stdin-socket, else
 * the connection, too.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void need(int ok, const char *what) {
    if (!ok) {
        perror(what);
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s HOST PORT PROGRAM ARGUMENT...\n", argv[0]);
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[2]))};
    need(inet_pton(AF_INET, argv[1], &address.sin_addr) == 1, "HOST");
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    need(listener >= 0, "socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    /* Accepted connections inherit it; the units have NoDelay=yes too. */
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    need(bind(listener, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    need(listen(listener, 4096) == 0, "listen");
    int both = argc > 4 && strcmp(argv[4], "--use-stdin-socket") == 0;
    /* The kernel reaps the children. */
    struct sigaction ignore = {.sa_handler = SIG_IGN, .sa_flags = SA_NOCLDWAIT};
    sigaction(SIGCHLD, &ignore, NULL);

    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0)
            continue;
        if (fork() == 0) {
            int out = both ? open("/dev/null", O_WRONLY) : connection;
            dup2(connection, 0);
            dup2(out, 1);
            close(out);
            execv(argv[3], argv + 3);
            _exit(125);
        }
        close(connection);
    }
}
