#!/usr/bin/env bash
# The C compiler proper (cc1) on a hundred lines that count words, optimised at -O2.
# Usage: capture-cc1.sh [OUT.parquet]. Takes about eight minutes, needs gcc and valgrind.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/cc1.parquet}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$work"
cat >tally.c <<'C'
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct word {
	struct word *next;
	unsigned long count;
	char text[];
};

static struct word *table[4096];

static unsigned long hash(const char *text)
{
	unsigned long sum = 1469598103934665603ul;

	while (*text)
		sum = (sum ^ (unsigned char)*text++) * 1099511628211ul;
	return sum;
}

static void count(const char *text)
{
	struct word **slot = &table[hash(text) % 4096];
	struct word *word;

	for (word = *slot; word; word = word->next)
		if (!strcmp(word->text, text))
			break;
	if (!word) {
		word = malloc(sizeof(*word) + strlen(text) + 1);
		if (!word)
			exit(1);
		strcpy(word->text, text);
		word->count = 0;
		word->next = *slot;
		*slot = word;
	}
	word->count++;
}

static int by_count(const void *left, const void *right)
{
	const struct word *a = *(struct word *const *)left;
	const struct word *b = *(struct word *const *)right;

	if (a->count != b->count)
		return a->count < b->count ? 1 : -1;
	return strcmp(a->text, b->text);
}

static double entropy(struct word **words, size_t n, double total)
{
	double bits = 0;

	for (size_t i = 0; i < n; i++) {
		double share = words[i]->count / total;

		bits -= share * log2(share);
	}
	return bits;
}

int main(void)
{
	static char text[256];
	struct word **words = NULL;
	size_t n = 0, room = 0, length = 0;
	double total = 0;
	int c;

	while ((c = getchar()) != EOF) {
		if (isalpha(c) && length < sizeof(text) - 1) {
			text[length++] = tolower(c);
			continue;
		}
		text[length] = '\0';
		if (length)
			count(text), total++;
		length = 0;
	}
	for (size_t i = 0; i < 4096; i++)
		for (struct word *word = table[i]; word; word = word->next) {
			if (n == room) {
				room = room ? 2 * room : 64;
				words = realloc(words, room * sizeof(*words));
				if (!words)
					return 1;
			}
			words[n++] = word;
		}
	qsort(words, n, sizeof(*words), by_count);
	for (size_t i = 0; i < n && i < 20; i++)
		printf("%8lu %s\n", words[i]->count, words[i]->text);
	printf("%zu words, %.3f bits\n", n, entropy(words, n, total));
	return 0;
}
C
gcc -E tally.c -o tally.i
env -i LC_ALL=C PATH=/usr/bin:/bin \
  valgrind --tool=lackey --trace-mem=yes --log-fd=9 \
  "$(gcc -print-prog-name=cc1)" -fpreprocessed tally.i -quiet -O2 -o tally.s 9>&1 >/dev/null |
  "${SIMKVM:-simkvm}" import lackey - --window 256 --out "$out"
