/* A libnvidia-ml.so.1 that says what a text file tells it to.
 *
 *   gcc -shared -fPIC -pthread -o libnvidia-ml.so.1 nvml.c
 *
 * FAKE_NVML_BOX names the file. It is read again at every call, so a test can change the box under
 * a running process. One line per thing, words apart by spaces, `name` last:
 *
 *   driver 570.86.15
 *   down                      the driver is gone: nothing but an init answers, and that fails
 *   card uuid=GPU-1 mem_total=34190917632 mem_used=1024 util=37 power_mw=412500 temp=61 name=RTX 5090
 *
 * A value that a card line leaves out is not supported. More words a card line can have: `lost` (it
 * fell off the bus), `lost_after=N` (it falls off in the N+1st read of its utilisation),
 * `denied` (no permission to open it), `hang` (asking for its power never returns).
 *
 * As with the real library, a lost card or driver comes back only with a new init, and a handle
 * does not outlive the init that it came from. fake_inits and fake_open count for the tests.
 */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
};

enum { MAX_CARDS = 16, MAX_LINE = 512 };

typedef struct {
    char line[MAX_LINE]; /* starts and ends with a space, so that " word" finds whole words */
} card_t;

typedef struct {
    int down;
    char driver[80];
    unsigned count;
    card_t cards[MAX_CARDS];
} box_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int inits, open_count, driver_lost;
static int lost[MAX_CARDS];      /* since this init */
static long readings[MAX_CARDS]; /* since the library was loaded */

int fake_inits(void) { return inits; }
int fake_open(void) { return open_count; }

static void load(box_t *box)
{
    const char *path = getenv("FAKE_NVML_BOX");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[MAX_LINE - 2];
    memset(box, 0, sizeof *box);
    if (!file) {
        fprintf(stderr, "fake nvml: FAKE_NVML_BOX names no file that can be read\n");
        abort();
    }
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "down"))
            box->down = 1;
        else if (sscanf(line, "driver %79s", box->driver) == 1)
            continue;
        else if (!strncmp(line, "card ", 5) && box->count < MAX_CARDS)
            snprintf(box->cards[box->count++].line, MAX_LINE, " %s ", line + 5);
        else if (line[0]) {
            fprintf(stderr, "fake nvml: what is '%s'?\n", line);
            abort();
        }
    }
    fclose(file);
}

static int word(const card_t *card, const char *text)
{
    char whole[40];
    snprintf(whole, sizeof whole, " %s ", text);
    return strstr(card->line, whole) != NULL;
}

static const char *value(const card_t *card, const char *key)
{
    char start[40];
    const char *found;
    snprintf(start, sizeof start, " %s=", key);
    found = strstr(card->line, start);
    return found ? found + strlen(start) : NULL;
}

static int number(const card_t *card, const char *key, unsigned long long *out)
{
    const char *text = value(card, key);
    if (!text)
        return NOT_SUPPORTED;
    *out = strtoull(text, NULL, 10);
    return SUCCESS;
}

static int copy(const char *text, size_t length, char *out, unsigned size)
{
    if (length + 1 > size)
        return INSUFFICIENT_SIZE;
    memcpy(out, text, length);
    out[length] = 0;
    return SUCCESS;
}

/* Every call but init comes through here. */
static int ready(box_t *box)
{
    load(box);
    if (box->down)
        driver_lost = 1;
    return open_count == 0 || driver_lost ? UNINITIALIZED : SUCCESS;
}

/* A handle is the number of the init it came from, and the card's place plus one. */
static int card_of(void *handle, card_t *out, unsigned *place)
{
    uintptr_t number_ = (uintptr_t)handle;
    box_t box;
    int rc;
    pthread_mutex_lock(&lock);
    rc = ready(&box);
    *place = (unsigned)(number_ & 0xff) - 1;
    if (rc == SUCCESS && (number_ >> 8 != (uintptr_t)inits || *place >= MAX_CARDS))
        rc = INVALID_ARGUMENT;
    if (rc == SUCCESS && (*place >= box.count || word(&box.cards[*place], "lost")))
        lost[*place] = 1;
    if (rc == SUCCESS && lost[*place])
        rc = GPU_IS_LOST;
    if (rc == SUCCESS)
        *out = box.cards[*place];
    pthread_mutex_unlock(&lock);
    return rc;
}

int nvmlInitWithFlags(unsigned flags)
{
    box_t box;
    int rc = SUCCESS;
    (void)flags;
    pthread_mutex_lock(&lock);
    load(&box);
    inits++;
    if (box.down)
        rc = DRIVER_NOT_LOADED;
    else if (open_count++ == 0) {
        driver_lost = 0;
        memset(lost, 0, sizeof lost);
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

int nvmlShutdown(void)
{
    int rc = SUCCESS;
    pthread_mutex_lock(&lock);
    if (open_count == 0)
        rc = UNINITIALIZED;
    else
        open_count--;
    pthread_mutex_unlock(&lock);
    return rc;
}

const char *nvmlErrorString(int code)
{
    (void)code;
    return "an error of the fake library";
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    box_t box;
    int rc;
    pthread_mutex_lock(&lock);
    rc = ready(&box);
    pthread_mutex_unlock(&lock);
    if (rc == SUCCESS && !box.driver[0])
        rc = NOT_SUPPORTED;
    return rc ? rc : copy(box.driver, strlen(box.driver), version, length);
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    box_t box;
    int rc;
    pthread_mutex_lock(&lock);
    rc = ready(&box);
    pthread_mutex_unlock(&lock);
    *count = box.count;
    return rc;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    void *candidate = (void *)((uintptr_t)inits << 8 | (index + 1));
    card_t card;
    unsigned place;
    int rc = card_of(candidate, &card, &place);
    if (rc == SUCCESS && word(&card, "denied"))
        rc = NO_PERMISSION;
    *handle = candidate;
    return rc;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length)
{
    card_t card;
    unsigned place;
    int rc = card_of(handle, &card, &place);
    const char *text = rc ? NULL : value(&card, "uuid");
    if (rc)
        return rc;
    return text ? copy(text, strcspn(text, " "), uuid, length) : NOT_SUPPORTED;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    card_t card;
    unsigned place;
    int rc = card_of(handle, &card, &place);
    const char *text = rc ? NULL : value(&card, "name");
    if (rc)
        return rc;
    return text ? copy(text, strlen(text) - 1, name, length) : NOT_SUPPORTED;
}

typedef struct {
    unsigned long long total, free, used;
} memory_t;

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory)
{
    card_t card;
    unsigned place;
    int rc = card_of(handle, &card, &place);
    if (rc == SUCCESS)
        rc = number(&card, "mem_total", &memory->total);
    if (rc == SUCCESS)
        rc = number(&card, "mem_used", &memory->used);
    memory->free = rc ? 0 : memory->total - memory->used;
    return rc;
}

typedef struct {
    unsigned gpu, memory;
} utilization_t;

int nvmlDeviceGetUtilizationRates(void *handle, utilization_t *utilization)
{
    card_t card;
    unsigned place;
    unsigned long long percent = 0, reads;
    int rc = card_of(handle, &card, &place);
    if (rc == SUCCESS && number(&card, "lost_after", &reads) == SUCCESS &&
        ++readings[place] == (long)reads + 1) {
        lost[place] = 1;
        return GPU_IS_LOST;
    }
    if (rc == SUCCESS)
        rc = number(&card, "util", &percent);
    utilization->gpu = (unsigned)percent;
    utilization->memory = 0;
    return rc;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    card_t card;
    unsigned place;
    unsigned long long power = 0;
    int rc = card_of(handle, &card, &place);
    while (rc == SUCCESS && word(&card, "hang"))
        pause();
    if (rc == SUCCESS)
        rc = number(&card, "power_mw", &power);
    *milliwatts = (unsigned)power;
    return rc;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius)
{
    card_t card;
    unsigned place;
    unsigned long long temperature = 0;
    int rc = card_of(handle, &card, &place);
    (void)sensor;
    if (rc == SUCCESS)
        rc = number(&card, "temp", &temperature);
    *celsius = (unsigned)temperature;
    return rc;
}
