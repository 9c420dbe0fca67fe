/* What somebody may have meant by a misspelt word. */
#ifndef QR_PLUGIN_NAMES_H
#define QR_PLUGIN_NAMES_H

/* The one of names (NULL at the end) that is nearest to word, or NULL if none is
 * near: at most two letters changed, added, left out or swapped with their
 * neighbour, at most a third of the word, case and '-' for '_' aside.
 */
const char *name_nearest (const char *word, const char *const *names);

#endif /* QR_PLUGIN_NAMES_H */
