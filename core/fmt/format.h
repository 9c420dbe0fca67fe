/* Constants of the on-disk format, in the words of the qcow2 specification
 * (docs/interop/qcow2 in QEMU's source).  One line each, by section.
 */
#ifndef QR_FMT_FORMAT_H
#define QR_FMT_FORMAT_H

#include <stdint.h>

/* "Header": offsets of the fields, in bytes from the start of the file. */
#define HEADER_MAGIC               UINT32_C (0x514649fb)    /* "QFI\xfb" */
#define HEADER_OFF_MAGIC           0
#define HEADER_OFF_VERSION         4
#define HEADER_OFF_BACKING_OFF     8
#define HEADER_OFF_BACKING_LEN     16
#define HEADER_OFF_CLUSTER_BITS    20
#define HEADER_OFF_SIZE            24
#define HEADER_OFF_CRYPT_METHOD    32
#define HEADER_OFF_L1_SIZE         36
#define HEADER_OFF_L1_TABLE        40
#define HEADER_OFF_RT              48      /* refcount_table_offset, then clusters: 12 bytes */
#define HEADER_OFF_RT_CLUSTERS     56
#define HEADER_OFF_NB_SNAPSHOTS    60
#define HEADER_OFF_SNAPSHOTS       64
#define HEADER_V2_LENGTH           72
#define HEADER_OFF_INCOMPATIBLE    72
#define HEADER_OFF_COMPATIBLE      80
#define HEADER_OFF_AUTOCLEAR       88
#define HEADER_OFF_REFCOUNT_ORDER  96
#define HEADER_OFF_HEADER_LENGTH   100
#define HEADER_V3_MIN_LENGTH       104
#define HEADER_OFF_COMPRESSION     104

#define INCOMPAT_DIRTY             (UINT64_C (1) << 0)
#define INCOMPAT_CORRUPT           (UINT64_C (1) << 1)
#define INCOMPAT_DATA_FILE         (UINT64_C (1) << 2)
#define INCOMPAT_COMPRESSION       (UINT64_C (1) << 3)
#define INCOMPAT_EXTENDED_L2       (UINT64_C (1) << 4)
#define INCOMPAT_KNOWN             UINT64_C (0x1f)
#define COMPAT_LAZY_REFCOUNTS      (UINT64_C (1) << 0)
#define AUTOCLEAR_BITMAPS          (UINT64_C (1) << 0)
#define AUTOCLEAR_DATA_FILE_RAW    (UINT64_C (1) << 1)
#define AUTOCLEAR_KNOWN            UINT64_C (0x3)

#define CRYPT_NONE                 0
#define CRYPT_AES                  1
#define CRYPT_LUKS                 2

/* "Header extensions" */
#define EXT_END                    UINT32_C (0x00000000)
#define EXT_BACKING_FORMAT         UINT32_C (0xe2792aca)
#define EXT_BACKING_FORMAT_CROSVM  UINT32_C (0xe279268f)   /* a misspelling: same contents */
#define EXT_FEATURE_NAMES          UINT32_C (0x6803f857)
#define EXT_BITMAPS                UINT32_C (0x23852875)
#define EXT_CRYPTO_HEADER          UINT32_C (0x0537be77)
#define EXT_DATA_FILE              UINT32_C (0x44415441)
#define FEATURE_NAME_ENTRY_LENGTH  48
#define BITMAPS_EXT_LENGTH         24
#define CRYPTO_EXT_LENGTH          16

/* "Host cluster management" */
#define RTE_OFF_MASK               UINT64_C (0xfffffffffffffe00)    /* bits 9-63 */
#define RTE_RESERVED_MASK          UINT64_C (0x00000000000001ff)

/* "Cluster mapping" */
#define L1E_OFF_MASK               UINT64_C (0x00fffffffffffe00)    /* bits 9-55 */
#define L1E_RESERVED_MASK          UINT64_C (0x7f000000000001ff)
#define L2E_OFF_MASK               UINT64_C (0x00fffffffffffe00)
#define L2E_STD_RESERVED_MASK      UINT64_C (0x3f000000000001fe)    /* bit 0 is the zero flag */
#define L2E_ZERO                   (UINT64_C (1) << 0)
#define L2E_COMPRESSED             (UINT64_C (1) << 62)
#define ENTRY_COPIED               (UINT64_C (1) << 63)             /* refcount is exactly one */

/* "Snapshots" */
#define SNAPSHOT_FIXED_LENGTH      40
#define SNAPSHOT_V3_EXTRA_LENGTH   16

/* "Bitmaps" */
#define BITMAP_DIR_FIXED_LENGTH    24
#define BITMAP_FLAG_IN_USE         UINT32_C (1)
#define BITMAP_FLAGS_RESERVED      UINT32_C (0xfffffff8)
#define BITMAP_TYPE_TRACKING          1
#define BITMAP_MIN_GRANULARITY     9    /* log2 of bytes; QEMU's limits */
#define BITMAP_MAX_GRANULARITY     31
#define MAX_BITMAP_NAME            1023
#define BITMAP_TABLE_OFF_MASK      UINT64_C (0x00fffffffffffe00)
#define BITMAP_TABLE_RESERVED_MASK UINT64_C (0xff000000000001fe)

/* Limits of ours.  Each equals QEMU's, so that no image that QEMU opens is refused. */
#define MIN_CLUSTER_BITS           9
#define MAX_CLUSTER_BITS           21
#define MAX_REFCOUNT_ORDER         6
#define MAX_L1_BYTES               (UINT64_C (32) << 20)
#define MAX_RT_BYTES               (UINT64_C (8) << 20)
#define MAX_SNAPSHOTS              65536
#define MAX_SNAPSHOT_TABLE_BYTES   (UINT64_C (64) << 20)
#define MAX_SNAPSHOT_EXTRA_BYTES   1024
#define MAX_BITMAPS                65535
#define MAX_BITMAP_DIR_BYTES       (UINT64_C (64) << 20)
#define MAX_BACKING_NAME           1023
#define MAX_HOST_OFF               (UINT64_C (1) << 56)     /* what an L2 entry can hold */

#endif /* QR_FMT_FORMAT_H */
