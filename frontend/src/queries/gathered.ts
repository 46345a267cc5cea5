/**
 * A function that gathers items, and hands them to `handle` together: at once when it has rested, but neither
 * more often than every so many milliseconds nor while it is still handling those before.
 */
export function gathered<T>(
  everyMs: number,
  handle: (items: ReadonlySet<T>) => Promise<unknown>,
): (item: T) => void {
  let waiting = new Set<T>();
  let isBusy = false;

  async function work(): Promise<void> {
    isBusy = true;
    while (waiting.size > 0) {
      const items = waiting;
      waiting = new Set();
      await Promise.all([handle(items), new Promise((resolve) => setTimeout(resolve, everyMs))]);
    }
    isBusy = false;
  }

  return (item) => {
    waiting.add(item);
    if (!isBusy) void work();
  };
}
