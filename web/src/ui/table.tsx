import type { ReactNode } from "react";
import { Button } from "./parts";

export interface Column<T> {
  name: string;
  cell: (row: T) => ReactNode;
  /** Left out on narrow screens. */
  wide?: boolean;
  right?: boolean;
}

export function Table<T>({ of, columns, rows, id }: { of: string; columns: Column<T>[]; rows: T[]; id: (row: T) => string }) {
  const place = (column: Column<T>) => `${column.wide ? "hidden md:table-cell" : ""} ${column.right ? "text-right" : "text-left"}`;
  return (
    <div className="overflow-x-auto" tabIndex={0} role="region" aria-label={of}>
      <table className="w-full text-sm">
        <caption className="sr-only">{of}</caption>
        <thead>
          <tr className="border-b border-line text-xs text-soft">
            {columns.map((column) => (
              <th key={column.name} scope="col" className={`px-4 py-2 font-medium whitespace-nowrap ${place(column)}`}>
                {column.name}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={id(row)} className="border-b border-line last:border-0 hover:bg-bg">
              {columns.map((column) => (
                <td key={column.name} className={`px-4 py-2 align-top ${place(column)}`}>
                  {column.cell(row)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** Pages come from the server, one at a time. */
export function Pager({ first, next, to }: { first: boolean; next?: string | null; to: (token: string | undefined) => void }) {
  if (first && !next) return null;
  return (
    <nav aria-label="Pages" className="flex justify-end gap-2 border-t border-line px-4 py-2">
      {!first && <Button onClick={() => to(undefined)}>First page</Button>}
      {next && <Button onClick={() => to(next)}>Next page</Button>}
    </nav>
  );
}
