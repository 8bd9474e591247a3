/* The limit that the gateway is measured against: receive a datagram, scan it, write its line. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

int main(int argc, char **argv) {
    if (argc != 3) return 2; /* receiver PORT FILE */
    int sock = socket(AF_INET, SOCK_DGRAM, 0), size = 8 << 20;
    setsockopt(sock, SOL_SOCKET, 33 /* SO_RCVBUFFORCE */, &size, sizeof size);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(sock, (struct sockaddr *)&address, sizeof address)) return 1;
    FILE *file = fopen(argv[2], "a");
    if (!file) return 1;
    static char data[8193];
    volatile long quotes = 0;
    for (;;) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t got = recvfrom(sock, data, sizeof data, 0, (struct sockaddr *)&from, &length);
        if (got < 0) continue;
        for (ssize_t i = 0; i < got; i++) quotes += data[i] == '"';
        char host[INET_ADDRSTRLEN];
        inet_ntop(AF_INET, &from.sin_addr, host, sizeof host);
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        fprintf(file, "{\"timestamp\": %ld.%06ld, \"state\": ", (long)now.tv_sec, now.tv_nsec / 1000);
        fwrite(data, 1, got, file);
        fprintf(file, ", \"source\": \"%s:%d\"}\n", host, ntohs(from.sin_port));
    }
}
